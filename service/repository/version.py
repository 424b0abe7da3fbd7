"""One version of a model: read, checked, tried in a confined process, then opened and replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from service.contract import manifest as manifests
from service.contract.golden import archive_bytes, read_golden
from service.contract.manifest import MAX_FILE_BYTES, File, Golden, Graph, Manifest, ManifestError
from service.errors import StartError, one_line
from service.repository.confined import Killed, TookTooLong, run_module
from service.repository.warm_up import take_timings, warm
from service.runtime.model import Model
from service.runtime.program import Timing
from service.runtime.session import PROVIDERS, Session
from service.runtime.thread import in_threads

OWN_THREAD = ("refinement", "elbo_gradient", "log_joint")
"""Graphs of iterative work. They run on the caller's nice-19 thread; onnxruntime's own threads are not nice."""


class Version(NamedTuple):
    """The files of a version, all as its manifest says. digest: of the manifest, and so of everything."""

    folder: Path
    digest: str
    manifest: Manifest
    graphs: dict[str, bytes]
    golden: dict[str, Any]


class LoadLimits(NamedTuple):
    """Time and memory that opening a version may take."""

    time_s: float = 60.0
    memory_bytes: int = 4 * 2**30


class Trial(NamedTuple):
    """What `python -m service.repository.trial` is asked for. timed: whether the programs are timed too."""

    folder: str
    threads: int
    max_rows: int
    memory_bytes: int
    timed: bool


def open_model(
    folder: Path,
    provider: str,
    threads: int,
    max_rows: int,
    limits: LoadLimits = LoadLimits(),  # noqa: B008  # a tuple
) -> Model:
    """Try one version in a process of its own, then open and replay it here.

    Raises: StartError.
    """
    on_cpu = provider == PROVIDERS["cpu"]
    digest, timings = _tried(Trial(str(folder), threads, max_rows, limits.memory_bytes, on_cpu), limits.time_s)
    try:
        version = read_version(folder)
        if version.digest != digest:
            raise StartError(f"{folder} was changed while it was opened; load it again")
        model = assembled(version, provider, threads)
        if on_cpu:
            take_timings(model, version.golden, max_rows, timings)
        else:
            warm(model, version.golden, max_rows)
    except MemoryError as error:
        raise StartError(f"{folder} needs more memory than is free; give the service more") from error
    return model


def check_files(folder: Path, manifest: Manifest) -> None:
    """Refuse a version whose files are no longer as its manifest says.

    Raises: StartError.
    """
    golden = manifest.golden
    try:
        for entry in manifest.files():
            if not manifests.has_digest(folder, entry, archive_bytes(manifest) if entry is golden else MAX_FILE_BYTES):
                raise _changed(folder, entry)
    except ManifestError as error:
        raise StartError(str(error)) from error


def read_version(folder: Path) -> Version:
    """Read the files of a version; those that the manifest does not list are left alone.

    Raises: StartError where one is not as the manifest says.
    """
    try:
        text = manifests.read_text(folder)
        manifest = manifests.parse_file(folder, text)
        if (manifest.name, manifest.version) != (folder.parent.name, folder.name):
            raise StartError(
                f"{folder} holds version {manifest.version} of {manifest.name}; name the folders after them"
            )
    except ManifestError as error:
        raise StartError(str(error)) from error
    graphs = {name: _checked(folder, graph, MAX_FILE_BYTES) for name, graph in manifest.graphs.items()}
    archive = _checked(folder, manifest.golden, archive_bytes(manifest))
    try:
        golden = read_golden(archive, manifest)
    except ManifestError as error:
        raise StartError(f"{folder} cannot be opened: {error}") from error
    return Version(folder, manifests.digest(text), manifest, graphs, golden)


def assembled(version: Version, provider: str, threads: int) -> Model:
    """The model, whose graphs are opened as many at a time as there are threads, and replayed.

    Raises: StartError; MemoryError.
    """
    shapes = version.manifest.graphs

    def opened(name: str) -> Session:
        try:
            return Session(version.graphs[name], provider, 1 if name in OWN_THREAD else threads, shapes[name])
        except MemoryError:
            raise
        except Exception as error:
            told = f"{version.folder} cannot be opened: {shapes[name].file}: {one_line(error)}"
            raise StartError(told) from error

    names = sorted(shapes, key=lambda name: -len(version.graphs[name]))  # the largest first: few take most of the time
    try:
        graphs = dict(zip(names, in_threads(opened, names, threads), strict=True))
        model = Model(version.manifest, graphs)
        model.replay(version.golden)
    except (StartError, MemoryError):
        raise
    except Exception as error:
        raise StartError(f"{version.folder} cannot be opened: {one_line(error)}") from error
    return model


def _tried(trial: Trial, limit_s: float) -> tuple[str, list[Timing]]:
    """The digest of the manifest that has passed, and how long its programs take.

    Raises: StartError.
    """
    try:
        answer = json.loads(run_module("service.repository.trial", json.dumps(trial), limit_s))
    except TookTooLong as error:
        raise StartError(
            f"{trial.folder} was not opened and replayed within the {limit_s:g} s of VAE_LOAD_LIMIT_S; raise it, or "
            "export the model again"
        ) from error
    except Killed as error:
        raise StartError(
            f"{trial.folder} ended the process in which it was tried ({error}): it needs more memory than the "
            f"{trial.memory_bytes} bytes of VAE_LOAD_MEMORY_BYTES or than is free, or onnxruntime cannot run it"
        ) from error
    if "refused" in answer:
        raise StartError(answer["refused"])
    return answer["digest"], [dict(map(tuple, timing)) for timing in answer["timings"]]


def _checked(folder: Path, entry: Graph | Golden, max_bytes: int) -> bytes:
    """A file's content, read once, so that what was digested is what is opened.

    Raises: StartError.
    """
    try:
        content = manifests.read_file(folder, entry.file, max_bytes)
    except ManifestError as error:
        raise StartError(str(error)) from error
    if manifests.digest(content) != entry.sha256:
        raise _changed(folder, entry)
    return content


def _changed(folder: Path, entry: File | Graph | Golden) -> StartError:
    path = folder / entry.file
    return StartError(f"{path} does not match the SHA-256 in its manifest; it was changed after the export")
