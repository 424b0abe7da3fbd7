"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = ".unfinished"


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
