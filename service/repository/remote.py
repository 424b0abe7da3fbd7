"""Remote model repositories: an fsspec URL, copied to a local folder and checked before it is served."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from service.contract import manifest as manifests
from service.contract.files import most_bytes
from service.contract.manifest import MAX_MANIFEST_BYTES, SIGNATURE_FILE, File, ManifestError
from service.contract.signature import SIGNATURE_BYTES
from service.errors import StartError
from service.repository.files import locked, replace
from service.repository.signatures import check_signature, read_signature
from service.settings import Settings

log = logging.getLogger(__name__)

EXTRA = "pip install '.[remote]' in the project's folder"
ATTEMPTS = 6
WAIT_S = 0.5
"""Wait before the second attempt; each further wait is twice as long."""
BLOCK_BYTES = 4 * 2**20
"""Bytes of one request, and so what a cut connection loses."""
PERMANENT = (FileNotFoundError, PermissionError, ValueError, TypeError)
"""Errors that a further attempt does not mend."""

Found = TypeVar("Found")


def local_copy(settings: Settings) -> Path:
    """Return the folder of the model repository; a remote one is copied first, or its copy updated.

    Raises:
        StartError: It cannot be copied; see `sync`.
    """
    if isinstance(settings.models, Path):
        return settings.models
    folder = Path(settings.cache) if settings.cache else _own_temporary_folder()
    copy = folder / folder_name(settings.models)
    return sync(settings.models, copy, settings.models_options, public_keys=settings.model_public_keys)


def sync(
    url: str,
    folder: Path,
    options: Mapping[str, Any] | None = None,
    wait_s: float = WAIT_S,
    public_keys: str = "",
) -> Path:
    """Make a folder hold what a remote repository holds, every file checked against its manifest.

    A version appears in the folder when it is complete. Files that are there already are not fetched again, and
    versions that the repository no longer has are removed.

    Args:
        url: Folder of <name>/<version>/manifest.json and, optionally, `default`; or one such manifest.
        folder: The local copy.
        options: Options of the file system, as fsspec takes them.
        wait_s: Wait before the second attempt of a request, in seconds; see `WAIT_S`.
        public_keys: PEM files of those who may sign versions, separated by commas; empty asks for no signature.

    Returns:
        The folder.

    Raises:
        StartError: In one line that names the file and the fix.
    """
    store = Store(url, options or {}, wait_s)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            versions = store.versions()
            fetched = [
                _copy(store, source, folder / name / version, public_keys)
                for (name, version), source in versions.items()
            ]
            _remove_others(folder, set(versions))
            _write_default(folder, store.default())
    except OSError as error:
        raise _cannot_write(folder, error) from error
    log.info("%s: %d versions checked, %.1f MB fetched", url, len(versions), sum(fetched) / 1e6)
    return folder


class Store:
    """A remote repository. A request that fails is made again, after growing waits.

    Args:
        url: As in `sync`.
        options: As in `sync`.
        wait_s: As in `sync`.

    Raises:
        StartError: No file system opens the URL.
    """

    def __init__(self, url: str, options: Mapping[str, Any], wait_s: float) -> None:
        if urlsplit(url).password:
            raise StartError("VAE_MODELS must hold no password; give it by the environment or VAE_MODELS_OPTIONS")
        self.url = url.rstrip("/")
        try:
            import tenacity  # noqa: PLC0415  # of the extra `remote`
            from fsspec.core import url_to_fs  # noqa: PLC0415  # of the extra `remote`

            self._files, self._root = url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError as error:
            raise StartError(f"{url}: {_said(error)}; models from elsewhere need the extra: {EXTRA}") from error
        except (ValueError, TypeError) as error:
            raise StartError(f"{url}: {_said(error)}; see VAE_MODELS and VAE_MODELS_OPTIONS") from error
        if hasattr(self._files, "retries"):
            self._files.retries = 1  # s3fs and gcsfs retry by themselves, and do not log it
        self._retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential(wait_s),
            retry=tenacity.retry_if_not_exception_type(PERMANENT),
            before_sleep=tenacity.before_sleep_log(log, logging.WARNING),
            reraise=True,
        )

    def versions(self) -> dict[tuple[str, str], str]:
        """Return the path of each version, by the names of its model and its own; hidden folders are left out.

        Raises:
            StartError: There is none, or a name is not plain.
        """
        if self._root.endswith(f"/{manifests.FILE_NAME}"):
            paths = [self._root]
        else:
            paths = self._ask(self.url, self._files.glob, f"{self._root}/*/*/{manifests.FILE_NAME}")
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
        """Return the content of the file that names the default models; empty where there is none.

        Raises:
            StartError: It cannot be read.
        """
        if self._root.endswith(f"/{manifests.FILE_NAME}"):
            return b""
        return self._optional(f"{self._root}/{manifests.DEFAULT_FILE}", manifests.MAX_DEFAULT_BYTES) or b""

    def manifest(self, version: str) -> bytes:
        """Return the text of a version's manifest.

        Raises:
            StartError: It cannot be read.
        """
        return b"".join(self._blocks(f"{version}/{manifests.FILE_NAME}", MAX_MANIFEST_BYTES))

    def signature(self, version: str) -> bytes | None:
        """Return the signature of a version's manifest; None where there is none.

        Raises:
            StartError: It cannot be read.
        """
        return self._optional(f"{version}/{SIGNATURE_FILE}", SIGNATURE_BYTES)

    def _optional(self, path: str, max_bytes: int) -> bytes | None:
        try:
            return b"".join(self._blocks(path, max_bytes))
        except StartError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def fetch(self, version: str, entry: File, folder: Path, max_bytes: int) -> int:
        """Copy one file of a version; it appears under its name when its digest is right.

        Args:
            version: Path of the version.
            entry: The file, as the manifest lists it.
            folder: Folder for the copy.
            max_bytes: Upper bound on its size.

        Returns:
            Its size in bytes.

        Raises:
            StartError: It cannot be read, has another digest, or is larger.
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
            raise _cannot_write(unfinished, error) from error
        finally:
            unfinished.unlink(missing_ok=True)
        return size

    def _blocks(self, path: str, max_bytes: int) -> Iterator[bytes]:
        """Yield a file's content; a cut connection costs one block.

        Raises:
            StartError: It is not a file, or larger than `max_bytes`.
        """
        shown = self.shown(path)
        about = self._ask(shown, self._files.info, path)
        size = about["size"]
        if about.get("type", "file") != "file":  # to read a FIFO would wait for ever
            raise StartError(f"{shown} is not a regular file; upload the version again")
        too_large = StartError(f"{shown} is larger than the {max_bytes} bytes that it may have; upload it again")
        if size is None:  # a web server that does not tell
            content = self._ask(shown, self._head, path, max_bytes + 1)
            if len(content) > max_bytes:
                raise too_large
            yield content
            return
        if size > max_bytes:
            raise too_large
        start = 0
        while start < size:
            stop = min(size, start + BLOCK_BYTES)
            block = self._ask(shown, self._files.cat_file, path, start=start, end=stop)
            if not block:
                raise StartError(f"{shown} ends at {start} of its {size} bytes; upload the version again")
            start += len(block)  # a server without ranges sends all of it at once
            if start > size:
                raise StartError(f"{shown} has more than its {size} bytes; upload the version again")
            yield block

    def _head(self, path: str, size: int) -> bytes:
        """Return at most the first `size` bytes of a file."""
        parts, missing = [], size
        with self._files.open(path, "rb") as file:
            while missing and (part := file.read(min(missing, BLOCK_BYTES))):
                parts.append(part)
                missing -= len(part)
        return b"".join(parts)

    def _ask(self, about: str, request: Callable[..., Found], *arguments: Any, **further: Any) -> Found:
        """Make a request, again where it fails; `about` is what an error names.

        Raises:
            StartError: It has failed for good.
        """
        try:
            return self._retrying(request, *arguments, **further)
        except FileNotFoundError as error:
            raise StartError(f"{about} is not there; upload the version again, its manifest last") from error
        except Exception as error:
            raise StartError(f"{about}: {_said(error)}; see VAE_MODELS and VAE_MODELS_OPTIONS") from error

    def shown(self, path: str) -> str:
        """Return a path as a URL."""
        return str(self._files.unstrip_protocol(path))


def folder_name(url: str) -> str:
    """Return the name of a URL's local copy: readable, and different for every URL."""
    readable = re.sub(r"[^a-z0-9]+", "-", url.lower()).strip("-")[:64]
    return f"{readable}-{manifests.digest(url.encode())[:8]}"


def _copy(store: Store, source: str, folder: Path, public_keys: str) -> int:
    """Copy one version into a hidden folder, which is renamed when complete; returns the bytes fetched."""
    text, signature = store.manifest(source), store.signature(source)
    check_signature(store.shown(source), text, signature, public_keys)
    try:
        manifest = manifests.parse(text)
    except ManifestError as error:
        raise StartError(f"{store.shown(source)}/{manifests.FILE_NAME}: {error}") from error
    files, most = manifest.files(), most_bytes(manifest)
    if _has_manifest(folder, text, signature) and all(_has(folder, entry, most[entry.file]) for entry in files):
        return 0
    hidden, fetched = folder.with_name(f".{folder.name}"), 0
    hidden.mkdir(parents=True, exist_ok=True)
    (hidden / manifests.FILE_NAME).write_bytes(text)
    (hidden / SIGNATURE_FILE).unlink(missing_ok=True)
    if signature is not None:
        (hidden / SIGNATURE_FILE).write_bytes(signature)
    for done, entry in enumerate(files, 1):
        max_bytes = most[entry.file]
        if not _has(hidden, entry, max_bytes):
            if _has(folder, entry, max_bytes):
                shutil.copyfile(folder / entry.file, hidden / entry.file)
            else:
                fetched += store.fetch(source, entry, hidden, max_bytes)
        log.info("%s: %d of %d files, %.1f MB fetched", store.shown(source), done, len(files), fetched / 1e6)
    shutil.rmtree(folder, ignore_errors=True)
    hidden.rename(folder)
    return fetched


def _has_manifest(folder: Path, text: bytes, signature: bytes | None) -> bool:
    """Whether a folder has these bytes of a manifest, and of its signature."""
    with suppress(ManifestError):
        return (manifests.read_text(folder), read_signature(folder)) == (text, signature)
    return False


def _has(folder: Path, entry: File, max_bytes: int) -> bool:
    """Whether a folder has a file with the right digest."""
    with suppress(ManifestError):
        return manifests.has_digest(folder, entry, max_bytes)
    return False


def _remove_others(folder: Path, versions: set[tuple[str, str]]) -> None:
    """Remove versions that are no longer in the repository, and what interrupted copies left."""
    for path in folder.glob("*/*/"):
        if (path.parent.name, path.name) not in versions:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("*/"):
        with suppress(OSError):  # a model that has versions
            path.rmdir()


def _write_default(folder: Path, content: bytes) -> None:
    path = folder / manifests.DEFAULT_FILE
    if content:
        replace(path, content)
    else:
        path.unlink(missing_ok=True)


def _own_temporary_folder() -> Path:
    """Return a folder of this user in the temporary folder, where every user may write."""
    folder = Path(tempfile.gettempdir()) / f"vae-models-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        ours = folder.stat(follow_symlinks=False).st_uid == os.getuid()
    except OSError as error:
        raise StartError(f"{folder}: {error.strerror}; set VAE_CACHE to a folder for models") from error
    if not ours or folder.is_symlink():
        raise StartError(f"{folder} is somebody else's; set VAE_CACHE to a folder for models")
    return folder


def _cannot_write(path: Path, error: OSError) -> StartError:
    return StartError(f"{error.filename or path}: {error.strerror}; make room, or set VAE_CACHE to another folder")


def _said(error: Exception) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
