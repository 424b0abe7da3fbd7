"""Models from elsewhere: a repository at an fsspec URL, copied to a local folder and checked before it is served."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from service.contract import manifest as manifests
from service.contract.golden import archive_bytes
from service.contract.manifest import MAX_FILE_BYTES, MAX_MANIFEST_BYTES, File, Golden, Graph, ManifestError
from service.errors import StartError
from service.settings import Settings

log = logging.getLogger(__name__)

EXTRA = "pip install '.[remote]' in the project's folder"
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Before a question that failed is asked again."""
BLOCK_BYTES = 4 * 2**20
"""What is asked for at once; a connection that is cut costs one of these."""
NEVER_BETTER = (FileNotFoundError, PermissionError, ValueError, TypeError)
"""Failures that asking again does not mend."""

Found = TypeVar("Found")


def local_copy(settings: Settings) -> Path:
    """The folder of the model repository; one that is elsewhere is fetched first, or brought up to date.

    Raises: StartError.
    """
    if isinstance(settings.models, Path):
        return settings.models
    folder = Path(settings.cache) if settings.cache else _own_temporary_folder()
    return sync(settings.models, folder / folder_name(settings.models), settings.models_options)


def sync(url: str, folder: Path, options: Mapping[str, Any] | None = None, waits_s: Sequence[float] = WAITS_S) -> Path:
    """Make `folder` hold what the repository at `url` holds, every file checked against its manifest.

    url: what holds <name>/<version>/manifest.json, and `default` if wanted, or one such manifest. A version appears
    in `folder` complete or not at all, what is there already is not fetched again, and what the repository no longer
    has is removed.
    options: of the file system, as fsspec takes them.
    Raises: StartError in one line that names the file and the fix.
    """
    store = Store(url, options or {}, waits_s)
    try:
        with _alone(folder):
            versions = store.versions()
            fetched = [_bring(store, source, folder / name / version) for (name, version), source in versions.items()]
            _forget_others(folder, set(versions))
            _write_default(folder, store.default())
    except OSError as error:
        raise _no_room(folder, error) from error
    log.info("%s: %d versions checked, %.1f MB fetched", url, len(versions), sum(fetched) / 1e6)
    return folder


class Store:
    """A repository that fsspec can read; a question that fails is asked again, after growing waits."""

    def __init__(self, url: str, options: Mapping[str, Any], waits_s: Sequence[float]) -> None:
        if urlsplit(url).password:
            raise StartError("VAE_MODELS must hold no password; give it by the environment or VAE_MODELS_OPTIONS")
        self.url, self._waits_s = url.rstrip("/"), waits_s
        try:
            from fsspec.core import url_to_fs  # noqa: PLC0415  # of the extra `remote`

            self._files, self._root = url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError as error:
            raise StartError(f"{url}: {_said(error)}; models from elsewhere need the extra: {EXTRA}") from error
        except (ValueError, TypeError) as error:
            raise StartError(f"{url}: {_said(error)}; see VAE_MODELS and VAE_MODELS_OPTIONS") from error
        if hasattr(self._files, "retries"):
            self._files.retries = 1  # those of s3fs and gcsfs come on top of ours, and are not logged

    def versions(self) -> dict[tuple[str, str], str]:
        """Where each version is, by its model's name and its own; hidden folders are nobody's.

        Raises: StartError where there is none.
        """
        if self._root.endswith(f"/{manifests.FILE_NAME}"):
            paths = [self._root]
        else:
            paths = self._ask(partial(self._files.glob, f"{self._root}/*/*/{manifests.FILE_NAME}"), self.url)
        found = {}
        for path in paths:
            name, version = path.split("/")[-3:-1]
            if not (name.startswith(".") or version.startswith(".")):
                if not (manifests.is_plain_name(name) and manifests.is_plain_name(version)):
                    raise StartError(f"{self.shown(path)}: models and versions are named in lower case, digits, . _ -")
                found[name, version] = path.removesuffix(f"/{manifests.FILE_NAME}")
        if not found:
            raise StartError(
                f"{self.url} holds no model; expected <name>/<version>/{manifests.FILE_NAME}, and of a web server, "
                f"pages that list its folders; or name one version's {manifests.FILE_NAME} in VAE_MODELS"
            )
        return found

    def default(self) -> bytes:
        """What the file that names the default model holds; empty where there is none.

        Raises: StartError.
        """
        if self._root.endswith(f"/{manifests.FILE_NAME}"):
            return b""
        try:
            return b"".join(self._blocks(f"{self._root}/{manifests.DEFAULT_FILE}", manifests.MAX_DEFAULT_BYTES))
        except StartError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return b""
            raise

    def manifest(self, version: str) -> bytes:
        """The text of a version's manifest.

        Raises: StartError.
        """
        return b"".join(self._blocks(f"{version}/{manifests.FILE_NAME}", MAX_MANIFEST_BYTES))

    def fetch(self, version: str, entry: File | Graph | Golden, folder: Path, max_bytes: int) -> int:
        """Write one file of a version into `folder`, under its name only if its digest is right; gives its bytes.

        Raises: StartError, also where it has more than `max_bytes`.
        """
        source, unfinished = f"{version}/{entry.file}", folder / f".{entry.file}"
        found, size = hashlib.sha256(), 0
        try:
            with unfinished.open("wb") as file:
                for block in self._blocks(source, max_bytes):
                    file.write(block)
                    found.update(block)
                    size += len(block)
            if found.hexdigest() != entry.sha256:
                raise StartError(
                    f"{self.shown(source)} does not match the SHA-256 in its manifest; upload the version again"
                )
            unfinished.rename(folder / entry.file)
        except OSError as error:
            raise _no_room(unfinished, error) from error
        finally:
            unfinished.unlink(missing_ok=True)
        return size

    def _blocks(self, path: str, max_bytes: int) -> Iterator[bytes]:
        """A file's content; where a connection is cut it goes on with the block that was under way.

        Raises: StartError for what is not a file, and where there is more than `max_bytes`.
        """
        shown = self.shown(path)
        about = self._ask(partial(self._files.info, path), shown)
        size = about["size"]
        if about.get("type", "file") != "file":  # a FIFO would be waited for
            raise StartError(f"{shown} is not a regular file; upload the version again")
        too_large = StartError(f"{shown} is larger than the {max_bytes} bytes that it may have; upload it again")
        if size is None:  # a web server that does not say
            content = self._ask(partial(self._head, path, max_bytes + 1), shown)
            if len(content) > max_bytes:
                raise too_large
            yield content
            return
        if size > max_bytes:
            raise too_large
        start = 0
        while start < size:
            stop = min(size, start + BLOCK_BYTES)
            block = self._ask(partial(self._files.cat_file, path, start=start, end=stop), shown)
            if not block:
                raise StartError(f"{shown} ends at {start} of its {size} bytes; upload the version again")
            start += len(block)  # all of it at once from a server without ranges
            if start > size:
                raise StartError(f"{shown} has more than its {size} bytes; upload the version again")
            yield block

    def _head(self, path: str, size: int) -> bytes:
        """At most so many bytes of a file's beginning."""
        parts, missing = [], size
        with self._files.open(path, "rb") as file:
            while missing and (part := file.read(min(missing, BLOCK_BYTES))):
                parts.append(part)
                missing -= len(part)
        return b"".join(parts)

    def _ask(self, question: Callable[[], Found], about: str) -> Found:
        for attempt in range(len(self._waits_s) + 1):
            try:
                return question()
            except FileNotFoundError as error:
                raise StartError(f"{about} is not there; upload the version again, its manifest last") from error
            except Exception as error:
                if isinstance(error, NEVER_BETTER) or attempt == len(self._waits_s):
                    raise StartError(f"{about}: {_said(error)}; see VAE_MODELS and VAE_MODELS_OPTIONS") from error
                wait_s = self._waits_s[attempt]
                log.warning("%s: %s; asked again in %g s", about, _said(error), wait_s)
                time.sleep(wait_s)
        raise AssertionError("the last attempt answers or raises")

    def shown(self, path: str) -> str:
        """The path as a URL, as a person would look for it."""
        return str(self._files.unstrip_protocol(path))


def folder_name(url: str) -> str:
    """Of the local copy: readable, and another one for every URL."""
    readable = re.sub(r"[^a-z0-9]+", "-", url.lower()).strip("-")[:64]
    return f"{readable}-{manifests.digest(url.encode())[:8]}"


def _bring(store: Store, source: str, folder: Path) -> int:
    """One version, put together in a hidden folder and shown when it is whole; gives the bytes that were fetched."""
    text = store.manifest(source)
    try:
        manifest = manifests.parse(text)
    except ManifestError as error:
        raise StartError(f"{store.shown(source)}/{manifests.FILE_NAME}: {error}") from error
    files = manifest.files()
    most = {entry.file: MAX_FILE_BYTES for entry in files} | {manifest.golden.file: archive_bytes(manifest)}
    if _holds_manifest(folder, text) and all(_holds(folder, entry, most[entry.file]) for entry in files):
        return 0
    hidden, fetched = folder.with_name(f".{folder.name}"), 0
    hidden.mkdir(parents=True, exist_ok=True)
    (hidden / manifests.FILE_NAME).write_bytes(text)
    for done, entry in enumerate(files, 1):
        max_bytes = most[entry.file]
        if not _holds(hidden, entry, max_bytes):
            if _holds(folder, entry, max_bytes):
                shutil.copyfile(folder / entry.file, hidden / entry.file)
            else:
                fetched += store.fetch(source, entry, hidden, max_bytes)
        log.info("%s: %d of %d files, %.1f MB fetched", store.shown(source), done, len(files), fetched / 1e6)
    shutil.rmtree(folder, ignore_errors=True)
    hidden.rename(folder)
    return fetched


def _holds_manifest(folder: Path, text: bytes) -> bool:
    with suppress(ManifestError):
        return manifests.read_text(folder) == text
    return False


def _holds(folder: Path, entry: File | Graph | Golden, max_bytes: int) -> bool:
    """Whether the file is there with the right digest."""
    with suppress(ManifestError):
        return manifests.has_digest(folder, entry, max_bytes)
    return False


def _forget_others(folder: Path, versions: set[tuple[str, str]]) -> None:
    """Remove the versions, and what is left of interrupted ones, that are no longer in the repository."""
    for path in folder.glob("*/*/"):
        if (path.parent.name, path.name) not in versions:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("*/"):
        with suppress(OSError):  # a model that has versions
            path.rmdir()


def _write_default(folder: Path, content: bytes) -> None:
    """In one step, since a service may start from the same copy."""
    path = folder / manifests.DEFAULT_FILE
    if content:
        unfinished = folder / f".{path.name}"
        unfinished.write_bytes(content)
        unfinished.rename(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process brings the same folder up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another process that fetches it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _own_temporary_folder() -> Path:
    """Below the temporary folder, and of this user alone: anybody may write there."""
    folder = Path(tempfile.gettempdir()) / f"vae-models-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        ours = folder.stat(follow_symlinks=False).st_uid == os.getuid()
    except OSError as error:
        raise StartError(f"{folder}: {error.strerror}; set VAE_CACHE to a folder for models") from error
    if not ours or folder.is_symlink():
        raise StartError(f"{folder} is somebody else's; set VAE_CACHE to a folder for models")
    return folder


def _no_room(path: Path, error: OSError) -> StartError:
    """What stands in the way of writing there, and the fix."""
    return StartError(f"{error.filename or path}: {error.strerror}; make room, or set VAE_CACHE to another folder")


def _said(error: Exception) -> str:
    """An error's own words on one line."""
    return " ".join(str(error).split()) or type(error).__name__
