"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from training.errors import DiskError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside the old one, then replace it, so that a reader sees the old content or the new one.

    Args:
        path: The file.
        content: Its new content.

    Raises:
        DiskError: The file cannot be written; the old one stays.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DiskError(f"cannot write {path} ({error}); make room and run the same command again") from error
