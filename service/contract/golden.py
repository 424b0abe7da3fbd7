"""Golden rows: reading their archive safely, and comparing an answer with them."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from service.contract.manifest import Manifest, ManifestError, shown

OF_OWN_SCALE = ("elbo", "gradient", "features")
"""Ends of the names of outputs that are sums of large terms, which may cancel, or of the scale that a network chose."""
HEADER_BYTES = 2**14
"""Limit of the header of an array in the archive."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression that numpy writes. Others allocate memory before they give any data."""


def archive_bytes(manifest: Manifest) -> int:
    """Upper bound of the size of the archive of a manifest's golden rows."""
    return manifest.golden_bytes() + 2 * HEADER_BYTES * (1 + len(manifest.golden_shapes()))


def read_golden(content: bytes, manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """Read an .npz archive of golden rows. Sizes in the manifest bound what is decompressed.

    Args:
        content: The archive.
        manifest: Its manifest.

    Returns:
        float32 arrays by name, `<graph>/<tensor>`.

    Raises:
        ManifestError: The archive cannot be read, an array is missing or unknown, or has another type, shape or size
            than the manifest's.
    """
    shapes, file = manifest.golden_shapes(), manifest.golden.file
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = _members(archive, shapes.keys())
            return {name: _read_array(archive, members[name], shape) for name, shape in shapes.items()}
    except ManifestError as error:
        raise ManifestError(f"{file}: {error}; export the model again") from error
    except MemoryError:
        raise
    except Exception as error:
        raise ManifestError(
            f"{file} is no archive of arrays ({type(error).__name__}); export the model again"
        ) from error


def _members(archive: zipfile.ZipFile, names: AbstractSet[str]) -> dict[str, zipfile.ZipInfo]:
    """Members of the archive by name of array, if they are exactly those names, each once."""
    listed = archive.infolist()
    members = {info.filename.removesuffix(".npy"): info for info in listed}
    for name in sorted(members.keys() ^ names)[:1]:
        raise ManifestError(f"{shown(name)} {'is missing' if name in names else 'is no tensor of the graphs'}")
    if len(listed) > len(members):
        raise ManifestError("an array stands in it twice")
    return members


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, shape: tuple[int, ...]) -> NDArray[np.float32]:
    size = 4 * math.prod(shape)
    wrong = ManifestError(f"{shown(member.filename)} must be float32 of shape {list(shape)}")
    if member.compress_type not in METHODS or not size < member.file_size <= size + HEADER_BYTES:
        raise wrong
    with archive.open(member) as file:
        content = io.BytesIO(file.read(size + HEADER_BYTES + 1))
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(content)]
    found, by_columns, dtype = read_header(content)
    rows = content.read()
    if (found, dtype, len(rows)) != (shape, np.dtype("<f4"), size):
        raise wrong
    return np.ascontiguousarray(np.frombuffer(rows, "<f4").reshape(shape, order="F" if by_columns else "C"))


def deviation(output: str, found: NDArray[Any], known: NDArray[Any]) -> float:
    """Largest difference between an answer and the known one.

    Absolute for values up to 1, relative above. Small values of a sum are no more exact than its large ones, so outputs
    named as in `OF_OWN_SCALE` are compared relative to their largest value.
    """
    scale = np.abs(known).max() if output.endswith(OF_OWN_SCALE) else np.abs(known)
    return float((np.abs(found - known) / np.maximum(1.0, scale)).max())
