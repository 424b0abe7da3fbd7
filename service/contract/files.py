"""The files of a version: their largest sizes, and reading them against the digests of the manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path

from service.contract.golden import archive_bytes
from service.contract.manifest import (
    ADVICE,
    MAX_FILE_BYTES,
    File,
    Manifest,
    ManifestError,
    digest,
    has_digest,
    open_file,
)

MAX_DATA_BYTES = 2**33
"""Limit of a file of external data: two thousand million weights in float32."""


def most_bytes(manifest: Manifest) -> dict[str, int]:
    """Upper bounds of the sizes of a version's files, by their names."""
    views = manifest.views()
    golden = {view.golden.file: archive_bytes(view) for view in views}
    data = {entry.file: MAX_DATA_BYTES for view in views for graph in view.graphs.values() for entry in graph.data}
    return {entry.file: MAX_FILE_BYTES for entry in manifest.files()} | data | golden


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check the files of a version against the digests in its manifest.

    Raises:
        ManifestError: A file is missing, too large or has another digest.
    """
    most = most_bytes(manifest)
    for entry in manifest.files():
        if not has_digest(folder, entry, most[entry.file]):
            raise _changed(folder / entry.file)


class OpenFiles:
    """The files of a version, each opened once.

    They may be replaced, deleted or changed in place meanwhile: what `read` gives is a copy of its own, and has the
    digest of the manifest.

    Args:
        folder: Folder of the version.
        files: Open files, by name.
    """

    def __init__(self, folder: Path, files: dict[str, BufferedReader]) -> None:
        self._folder, self._files = folder, files

    def size(self, entry: File) -> int:
        """Return the size of a file, in bytes."""
        return os.fstat(self._files[entry.file].fileno()).st_size

    def read(self, entry: File) -> bytes:
        """Return the content of a file.

        Raises:
            ManifestError: It has another digest.
        """
        file, path = self._files[entry.file], self._folder / entry.file
        size = self.size(entry)
        file.seek(0)
        content = file.read(size + 1)  # allocates that many bytes at once
        if len(content) > size:
            raise ManifestError(f"{path} grew while it was read; {ADVICE}")
        if digest(content) != entry.sha256:
            raise _changed(path)
        return content


@contextmanager
def opened(folder: Path, manifest: Manifest) -> Iterator[OpenFiles]:
    """Open the files of a version while the block runs.

    Raises:
        ManifestError: A file is missing, not regular, or too large.
    """
    most = most_bytes(manifest)
    with ExitStack() as stack:
        files = {
            entry.file: stack.enter_context(open_file(folder, entry.file, most[entry.file]))
            for entry in manifest.files()
        }
        yield OpenFiles(folder, files)


def _changed(path: Path) -> ManifestError:
    return ManifestError(f"{path} does not match the SHA-256 in its manifest; it was changed after the export")
