"""Files: how they are read, and written so that they appear whole or not at all."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from vae_client.errors import UnreadableFile

SUFFIX = ".unfinished"


def read(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        UnreadableFile: It is empty.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    if not content:
        raise UnreadableFile(f"{path} is empty; it was perhaps not written to its end")
    return content


def load(path: Path) -> NDArray[Any] | dict[str, NDArray[Any]]:
    """The array of an .npy file, or the arrays of an .npz file by name.

    Raises:
        UnreadableFile: It is neither.
        OSError: It cannot be read.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return dict(loaded)
    except (ValueError, EOFError, MemoryError, BadZipFile, zlib.error) as error:  # what numpy raises for broken files
        raise UnreadableFile(f"{path} is no .npy or .npz file of numbers, or is cut short") from error


def write(path: Path, content: bytes) -> None:
    """Write a file under another name, then rename it: a reader, or a run after this one was killed, never sees a half.

    Args:
        path: The file, which is replaced.
        content: What it will hold.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a file that takes the place of `path` when the block ends, and is removed if it raises."""
    unfinished = path.with_name(f".{path.name}{SUFFIX}")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def below(folder: Path) -> list[Path]:
    """The files below a folder, in order, without hidden ones and those in hidden folders."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
