"""What is sent: arrays, PIL images, files and lists of them, as the files of a request."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from vae_client.errors import InvalidRequest
from vae_client.files import read

Array: TypeAlias = NDArray[Any]


class PillowImage(Protocol):
    """What is used of a PIL image, which is an extra."""

    mode: str
    info: dict[Any, Any]

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002  # Pillow's name
        """Write the image."""


Image: TypeAlias = Array | PillowImage | str | os.PathLike[str] | IO[bytes] | bytes
"""An image, or several: an array, a PIL image, the path of a file, an open file, or the bytes of a file."""
Images: TypeAlias = Image | Sequence[Image]
"""An image or a list of them. All images of a request have one size."""

NPY = "application/x-npy"
PNG_MODES = {"1", "L", "LA", "I;16", "P", "PA", "RGB", "RGBA"}
"""Modes of PIL images that a PNG holds without loss."""
TIFF_MODES = {"F", "I", "I;16B"}


class File(NamedTuple):
    """One file of a request.

    Attributes:
        name: Its name, for messages of the service.
        content: Its bytes: a picture as it is, so that the service sees all its bits, or .npy.
        array: Whether it is .npy that was made of an array.
    """

    name: str
    content: bytes
    array: bool = False


def files_of(images: Images) -> list[File]:
    """The files that are sent for images or masks.

    Arrays of one shape become one .npy.

    Raises:
        InvalidRequest: There are none, or something is no image.
        UnreadableFile: A file is empty.
        OSError: A file cannot be read.
    """
    if isinstance(images, list | tuple) and not (images and all(isinstance(one, int | float) for one in _flat(images))):
        if not images:
            raise InvalidRequest("the list of images is empty; send at least one")
        arrays = [one for one in images if isinstance(one, np.ndarray)]
        if len(arrays) == len(images) and arrays[0].ndim < 4 and len({one.shape for one in arrays}) == 1:
            return [_array_file(np.stack(arrays))]
        return [_file(one) for one in images]
    return [_file(images)]


def _flat(values: Sequence[Any]) -> list[Any]:
    """The first leaf of nested lists, in a list."""
    first: Any = values
    while isinstance(first, list | tuple) and first:
        first = first[0]
    return [first]


def _file(image: Any) -> File:
    """The file of one image."""
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        return File(path.name, read(path))
    if isinstance(image, bytes | bytearray | memoryview):
        return _held("image", bytes(image))
    if hasattr(image, "read"):
        content = image.read()
        if not isinstance(content, bytes):
            raise InvalidRequest("the file is open as text; open it with mode 'rb'")
        return _held(Path(str(getattr(image, "name", "image"))).name, content)
    if is_pillow(image):
        return _pillow_file(image)
    return _array_file(np.asarray(image))


def _held(name: str, content: bytes) -> File:
    if not content:
        raise InvalidRequest(f"{name} holds no bytes; was the file read to its end before, or never written?")
    return File(name, content)


def is_pillow(image: object) -> TypeGuard[PillowImage]:
    """Whether an object is a PIL image. Where Pillow is not imported, it is none."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(image, module.Image)


def _pillow_file(image: PillowImage) -> File:
    form = "PNG" if image.mode in PNG_MODES else "TIFF" if image.mode in TIFF_MODES else None
    if form is None:
        raise InvalidRequest(f"a PIL image of mode {image.mode} is not sent; use image.convert('RGB')")
    file = io.BytesIO()
    profile = image.info.get("icc_profile")
    image.save(file, form, **({"icc_profile": profile} if profile else {}))
    return File(f"image.{form.lower()}", file.getvalue())


def _array_file(array: Array) -> File:
    return File("image.npy", npy(array), array=True)


def npy(array: Array) -> bytes:
    """An array as an .npy file; float64 becomes float32, which models compute with.

    Raises:
        InvalidRequest: It does not hold numbers.
    """
    if array.dtype.kind not in "biuf":
        raise InvalidRequest(
            f"an array of {array.dtype} is no image; send numbers, a PIL image, a path, an open file or its bytes"
        )
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()
