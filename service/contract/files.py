"""The files of a version: their largest sizes, and reading them against the digests of the manifest."""

from __future__ import annotations

from pathlib import Path

from service.contract.golden import archive_bytes
from service.contract.manifest import (
    CARD_FILE,
    MAX_CARD_BYTES,
    MAX_FILE_BYTES,
    File,
    Manifest,
    ManifestError,
    digest,
    has_digest,
    read_file,
)


def most_bytes(manifest: Manifest) -> dict[str, int]:
    """Upper bounds of the sizes of a version's files, by their names."""
    lower = {view.golden.file: archive_bytes(view) for view in manifest.views()}
    lower |= dict.fromkeys((entry.file for entry in manifest.card_files()), MAX_CARD_BYTES)
    return {entry.file: lower.get(entry.file, MAX_FILE_BYTES) for entry in manifest.files()}


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check the files of a version against the digests in its manifest.

    Raises:
        ManifestError: A file is missing, too large or has another digest.
    """
    most = most_bytes(manifest)
    for entry in manifest.files():
        if not has_digest(folder, entry, most[entry.file]):
            raise _changed(folder, entry)


def read_checked(folder: Path, entry: File, max_bytes: int) -> bytes:
    """Read a file once, so that the content that was checked is the content that is opened.

    Raises:
        ManifestError: It is missing, larger than `max_bytes` or has another digest.
    """
    content = read_file(folder, entry.file, max_bytes)
    if digest(content) != entry.sha256:
        raise _changed(folder, entry)
    return content


def _changed(folder: Path, entry: File) -> ManifestError:
    path = folder / entry.file
    fix = f"; `python -m training card {folder}` writes it anew" if entry.file == CARD_FILE else ""
    return ManifestError(f"{path} does not match the SHA-256 in its manifest; it was changed after the export{fix}")
