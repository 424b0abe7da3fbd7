"""One version of a model: read and checked, tried in a confined process, then opened and replayed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from service.contract import manifest as manifests
from service.contract.files import most_bytes, read_checked
from service.contract.golden import read_golden
from service.contract.manifest import Manifest, ManifestError
from service.errors import StartError, one_line
from service.repository.confined import Killed, TookTooLong, run_module
from service.repository.progress import Tell, counted, tell_nobody
from service.repository.signatures import check_signature, read_signature
from service.repository.warm_up import take_timings, warm
from service.runtime.model import Model, replay, unit_range
from service.runtime.program import Timing
from service.runtime.session import PROVIDERS, Session
from service.runtime.thread import in_threads

OWN_THREAD = ("refinement", "elbo_gradient", "log_joint")
"""Graphs of iterative work. They run on the caller's nice-19 thread; onnxruntime's own threads are not nice."""


class Files(NamedTuple):
    """The files of one variant, checked against its manifest."""

    manifest: Manifest
    graphs: dict[str, bytes]
    golden: dict[str, Any]


class Version(NamedTuple):
    """The files of a version by variant, its model card, and the digest of the manifest, which covers all of them."""

    folder: Path
    digest: str
    variants: list[Files]
    card: dict[str, bytes]

    @property
    def golden(self) -> list[dict[str, Any]]:
        """Golden rows of each variant."""
        return [files.golden for files in self.variants]


class LoadRules(NamedTuple):
    """What a version must keep to when it is loaded.

    Attributes:
        time_s: Limit on the time, in seconds.
        memory_bytes: Limit on the memory.
        public_keys: PEM files of those who may sign versions, separated by commas; empty asks for no signature.
    """

    time_s: float = 60.0
    memory_bytes: int = 4 * 2**30
    public_keys: str = ""


class Trial(NamedTuple):
    """The argument of `python -m service.repository.trial`.

    Attributes:
        folder: Folder of the version.
        threads: Threads of a session.
        max_rows: Rows of the largest batch.
        memory_bytes: Limit of memory.
        timed: Whether programs are timed too.
        public_keys: As in `LoadRules`.
    """

    folder: str
    threads: int
    max_rows: int
    memory_bytes: int
    timed: bool
    public_keys: str


def open_model(
    folder: Path,
    provider: str,
    threads: int,
    max_rows: int,
    rules: LoadRules = LoadRules(),  # noqa: B008  # a tuple
    tell: Tell = tell_nobody,
) -> Model:
    """Try a version in a process of its own, then open, replay and warm it here.

    Args:
        folder: Folder of the version.
        provider: onnxruntime's name of the execution provider.
        threads: Threads of a graph.
        max_rows: Rows of a batch, for the warm-up.
        rules: What the version must keep to.
        tell: Takes each step.

    Raises:
        StartError: It cannot be served; the message names the file and the fix.
    """
    on_cpu = provider == PROVIDERS["cpu"]
    trial = Trial(str(folder), threads, max_rows, rules.memory_bytes, on_cpu, rules.public_keys)
    digest, timings = _try(trial, rules.time_s, tell)
    tell("reading")
    try:
        version = read_version(folder, rules.public_keys)
        if version.digest != digest:
            raise StartError(f"{folder} was changed while it was opened; load it again")
        model = assemble(version, provider, threads, tell)
        if on_cpu:
            take_timings(model, version.golden, max_rows, timings)
        else:
            tell("warming up")
            warm(model, version.golden, max_rows)
    except MemoryError as error:
        raise StartError(f"{folder} needs more memory than is free; give the service more") from error
    return model


def read_manifest(folder: Path, public_keys: str) -> tuple[bytes, Manifest]:
    """Read the manifest of a version, and check its signature before it is parsed.

    Args:
        folder: Folder of the version.
        public_keys: As in `LoadRules`.

    Returns:
        Its bytes, and the manifest.

    Raises:
        StartError: It is not signed by one of the keys, unusable, or of another version than its folder's.
    """
    with start_errors():
        text = manifests.read_text(folder)
        check_signature(folder, text, read_signature(folder) if public_keys else None, public_keys)
        manifest = manifests.parse_file(folder, text)
    if (manifest.name, manifest.version) != (folder.parent.name, folder.name):
        raise StartError(f"{folder} holds version {manifest.version} of {manifest.name}; name the folders after them")
    return text, manifest


def read_version(folder: Path, public_keys: str = "") -> Version:
    """Read the files of a version that its manifest lists.

    Raises:
        StartError: As `read_manifest`, or a file is not as the manifest says.
    """
    text, manifest = read_manifest(folder, public_keys)
    most = most_bytes(manifest)
    variants = [_read_variant(folder, view, most) for view in manifest.views()]
    with start_errors():
        card = {entry.file: read_checked(folder, entry, most[entry.file]) for entry in manifest.card_files()}
    return Version(folder, manifests.digest(text), variants, card)


def _read_variant(folder: Path, manifest: Manifest, most: dict[str, int]) -> Files:
    with start_errors():
        graphs = {name: read_checked(folder, graph, most[graph.file]) for name, graph in manifest.graphs.items()}
        archive = read_checked(folder, manifest.golden, most[manifest.golden.file])
    with start_errors(f"{folder} cannot be opened: "):
        golden = read_golden(archive, manifest)
    return Files(manifest, graphs, golden)


def assemble(version: Version, provider: str, threads: int, tell: Tell = tell_nobody) -> Model:
    """Open the graphs of a version, as many at a time as there are threads, and replay them.

    Args:
        version: The version.
        provider: onnxruntime's name of the execution provider.
        threads: Threads of a graph.
        tell: Takes each step.

    Returns:
        The first variant, which knows the others.

    Raises:
        StartError: A graph cannot be opened, or is off its golden vectors.
        MemoryError: There is too little memory.
    """
    variants: dict[int, Model] = {}
    next_one = counted(tell, "opening {} graphs", sum(len(files.graphs) for files in version.variants))
    for files in version.variants:
        graphs = _opened(version.folder, files, provider, threads, next_one)
        tell("replaying its golden rows")
        _replay(version.folder, files, graphs)
        Model(files.manifest, unit_range(files.manifest, graphs), variants=variants, card=version.card)
    return variants[version.variants[0].manifest.channels]


def _opened(
    folder: Path, files: Files, provider: str, threads: int, next_one: Callable[[], None]
) -> dict[str, Session]:
    """The graphs of a variant, opened."""
    shapes = files.manifest.graphs

    def opened(name: str) -> Session:
        next_one()
        try:
            return Session(files.graphs[name], provider, 1 if name in OWN_THREAD else threads, shapes[name])
        except MemoryError:
            raise
        except Exception as error:
            told = f"{folder} cannot be opened: {shapes[name].file}: {one_line(error)}"
            raise StartError(told) from error

    names = sorted(shapes, key=lambda name: -len(files.graphs[name]))  # the largest first: few take most of the time
    return dict(zip(names, in_threads(opened, names, threads), strict=True))


def _replay(folder: Path, files: Files, graphs: dict[str, Session]) -> None:
    try:
        replay(files.manifest, graphs, files.golden)
    except (StartError, MemoryError):
        raise
    except Exception as error:
        raise StartError(f"{folder} cannot be opened: {one_line(error)}") from error


@contextmanager
def start_errors(prefix: str = "") -> Iterator[None]:
    """Raise a ManifestError of the block as a StartError, with words before its message."""
    try:
        yield
    except ManifestError as error:
        raise StartError(f"{prefix}{error}") from error


def _try(trial: Trial, limit_s: float, tell: Tell) -> tuple[str, list[Timing]]:
    """Run the trial of a version; returns its manifest's digest and the timings of its programs.

    Raises:
        StartError: It has failed.
    """

    def heard(line: bytes) -> None:
        tell(f"trial: {one_line(line.decode(errors='replace'))}")

    tell("trial: starting")
    try:
        answer = json.loads(run_module("service.repository.trial", json.dumps(trial), limit_s, heard))
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
