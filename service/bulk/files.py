"""A folder of any file system that fsspec opens."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from service.errors import StartError, one_line

HOME = "_vae-bulk"
"""Folder of what a run keeps below its results. Readers of Parquet data sets pass over names that begin so."""
DRAFTS, LOCK = f"{HOME}/drafts", f"{HOME}/lock"
"""Local files while they are written or while a run needs them, and the file that one run at a time has locked."""


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

    @property
    def absolute(self) -> str:
        """Its name in any working directory, as processes on Ray have others."""
        return self.root if self.local else self.url

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
        """Open a file for writing that is there as a whole or not at all, whatever is raised or killed.

        It is written under a name of its own, as a process of an earlier run may still be ending. Then a local file is
        renamed, and another one uploaded: to close a remote file would upload a part of it, too.
        """
        with nullcontext(self.path(DRAFTS)) if self.local else TemporaryDirectory() as drafts:
            draft, path = Path(drafts, uuid4().hex), Path(self.path(name))
            draft.parent.mkdir(parents=True, exist_ok=True)
            try:
                with draft.open("wb") as file:
                    yield file
                if self.local:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    draft.replace(path)
                else:
                    self.files.put_file(str(draft), self.path(name))
            finally:
                draft.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self.files.rm_file(self.path(name))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a local folder for one run, and remove the drafts before and after it; a remote one has no lock.

        Raises:
            StartError: Another run writes there.
        """
        if not self.local:
            yield
            return
        path = Path(self.path(LOCK))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StartError(f"another run writes to {self.url}; wait for its end, or stop it") from None
            shutil.rmtree(self.path(DRAFTS), ignore_errors=True)  # a run that was killed has left them
            try:
                yield
            finally:
                shutil.rmtree(self.path(DRAFTS), ignore_errors=True)


class Hashed:
    """A file for writing that keeps a digest of what is written."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash, self.closed = file, sha256(), False

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
    found = sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()
