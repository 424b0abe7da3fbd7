"""A folder of any file system that fsspec opens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from service.errors import StartError, one_line

UNFINISHED = ".unfinished"
"""Ending of a local file while it is written."""


class Folder:
    """A folder, local or remote, by the URL that names it.

    Args:
        url: A path, or a URL such as s3://bucket/folder.
        options: Options of its file system, as fsspec takes them.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url, self.options = url, dict(options or {})

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            files, root = url_to_fs(self.url, use_listings_cache=False, **self.options)
        except (ImportError, ValueError, TypeError) as error:
            raise StartError(
                f"{self.url} cannot be opened: {one_line(error)}; file systems beyond this machine's need a package, "
                "such as s3fs, which the extra `remote` brings"
            ) from error
        return files, root.rstrip("/") or "/"

    @property
    def files(self) -> Any:
        """Its file system."""
        return self._opened[0]

    @property
    def root(self) -> str:
        """Its path in the file system."""
        return self._opened[1]

    @property
    def local(self) -> bool:
        """Whether it lies on this machine."""
        return isinstance(self.files, LocalFileSystem)

    def path(self, name: str) -> str:
        """The path of a file below it."""
        return f"{self.root}/{name}"

    def below(self, name: str) -> Folder:
        """A folder in this one."""
        return Folder(f"{self.url.rstrip('/')}/{name}", self.options)

    def names(self) -> list[str]:
        """Names of the files in it and in its folders, in order."""
        if not self.files.isdir(self.root):
            return []
        return sorted(path[len(self.root) :].lstrip("/") for path in self.files.find(self.root))

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            OSError: It cannot be read.
        """
        content: bytes = self.files.cat_file(self.path(name))
        return content

    def read_json(self, name: str) -> dict[str, Any] | None:
        """An object in JSON; None where there is no such file, or only a part of one."""
        try:
            found = json.loads(self.read(name))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def digest(self, name: str) -> str | None:
        """A digest of the content of a file; None where it cannot be read."""
        try:
            return digest_of(self.read(name))
        except OSError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file; see `written`."""
        with self.written(name) as file:
            file.write(content)

    @contextmanager
    def written(self, name: str) -> Iterator[Any]:
        """Open a file for writing that is there as a whole or not at all, whenever the process is killed.

        Object stores show an object when its upload ends. A local file is written under another name and renamed.
        """
        path = self.path(name)
        if not self.local:
            with self.files.open(path, "wb") as file:
                yield file
            return
        place = Path(path)
        draft = place.with_name(f".{place.name}{UNFINISHED}")
        draft.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            yield file
        draft.replace(place)


class Hashed:
    """A file for writing that keeps a digest of what is written."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash, self.closed = file, blake2b(digest_size=16), False

    def write(self, content: Any) -> int:
        """Write some bytes."""
        self._hash.update(content)
        return int(self._file.write(content))

    def tell(self) -> int:
        """Bytes so far."""
        return int(self._file.tell())

    def flush(self) -> None:
        """Do nothing: the file is flushed when it is closed."""

    def close(self) -> None:
        """Do nothing: who has opened the file closes it."""

    def digest(self) -> str:
        """The digest so far."""
        return self._hash.hexdigest()


def digest_of(*parts: str | bytes | memoryview) -> str:
    """A digest of texts and bytes."""
    found = blake2b(digest_size=16)
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()
