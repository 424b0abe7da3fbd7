"""One version of a model: read and checked, tried in a confined process, then opened and replayed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from service.contract import manifest as manifests
from service.contract.files import OpenFiles, opened
from service.contract.golden import read_golden
from service.contract.manifest import Graph, Manifest, ManifestError
from service.errors import StartError, one_line
from service.operations.registry import OPERATIONS
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


OPERATION_NAMES = frozenset(operation.name for operation in OPERATIONS)
LARGE_BYTES = 2**26
"""Above this size of its files, the graphs of a version are opened one after the other.

onnxruntime holds a graph of convolutions two and a half times while it opens it, and once afterwards.
"""


class Version(NamedTuple):
    """An open version.

    Attributes:
        folder: Its folder.
        digest: Digest of its manifest, which covers all of its files.
        variants: The manifest as each of its variants sees it.
        golden: Golden rows of each variant.
        files: Its files.
    """

    folder: Path
    digest: str
    variants: list[Manifest]
    golden: list[dict[str, Any]]
    files: OpenFiles

    def graph_bytes(self, graph: Graph) -> int:
        """Size of a graph with its external data."""
        return sum(self.files.size(entry) for entry in (graph, *graph.data))


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


class Tried(NamedTuple):
    """What the trial of a version has found.

    Attributes:
        digest: Digest of its manifest, which covers all of its files.
        timings: Timings of its programs; empty where they are for this process to measure.
        public_keys: As in `LoadRules`.
    """

    digest: str
    timings: list[Timing]
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
    known = tried(folder, provider, threads, max_rows, rules, tell)
    return open_tried(folder, provider, threads, max_rows, known, tell)


def open_tried(
    folder: Path, provider: str, threads: int, max_rows: int, known: Tried, tell: Tell = tell_nobody
) -> Model:
    """Open and replay a version that has been tried, here or on another machine, and take or measure its timings.

    Args:
        folder: Folder of the version.
        provider: onnxruntime's name of the execution provider.
        threads: Threads of a graph.
        max_rows: Rows of a batch, for the warm-up.
        known: What the trial has found.
        tell: Takes each step.

    Raises:
        StartError: It is another version than was tried, or cannot be served; the message names the file and the fix.
    """
    tell("reading")
    try:
        with open_version(folder, known.public_keys) as version:
            if version.digest != known.digest:
                raise StartError(f"{folder} is not as it was when it was tried; load it again")
            model = assemble(version, provider, threads, tell)
        if known.timings:
            take_timings(model, version.golden, max_rows, known.timings)
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
    ending = manifest.name.rpartition(".")[2]
    if ending != manifest.name and ending in OPERATION_NAMES:
        raise StartError(
            f"{folder}: the name {manifest.name} ends in .{ending}, which /v2 would read as the operation {ending} of "
            "another model; give the model another name, in its folder and its manifest"
        )
    return text, manifest


@contextmanager
def open_version(folder: Path, public_keys: str = "") -> Iterator[Version]:
    """Open the files of a version while the block runs, and read its golden rows.

    Raises:
        StartError: As `read_manifest`, or a file is not as the manifest says.
    """
    text, manifest = read_manifest(folder, public_keys)
    views = manifest.views()
    with ExitStack() as stack:
        with start_errors():
            files = stack.enter_context(opened(folder, manifest))
            archives = [files.read(view.golden) for view in views]
        with start_errors(f"{folder} cannot be opened: "):
            golden = [read_golden(archive, view) for archive, view in zip(archives, views, strict=True)]
        yield Version(folder, manifests.digest(text), views, golden, files)


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
    with start_errors():
        card = {entry.file: version.files.read(entry) for entry in version.variants[0].card_files()}
    models: list[Model] = []
    next_one = counted(tell, "opening {} graphs", sum(len(manifest.graphs) for manifest in version.variants))
    for manifest, golden in zip(version.variants, version.golden, strict=True):
        graphs = _open_graphs(version, manifest, provider, threads, next_one)
        tell("replaying its golden rows")
        _replay(version.folder, manifest, graphs, golden)
        models.append(Model(manifest, unit_range(manifest, graphs), card=card))
    first, *others = models
    return replace(first, others={other.manifest.channels: other for other in others})


def _open_graphs(
    version: Version, manifest: Manifest, provider: str, threads: int, next_one: Callable[[], None]
) -> dict[str, Session]:
    """The graphs of a variant. Their files are read one by one, so that few copies are in memory at a time."""
    shapes, files = manifest.graphs, version.files

    def open_graph(name: str) -> Session:
        next_one()
        graph = shapes[name]
        try:
            with start_errors():
                content = files.read(graph)
                data = {entry.file: files.read(entry) for entry in graph.data}
            return Session(content, provider, 1 if name in OWN_THREAD else threads, graph, data)
        except MemoryError:
            raise
        except Exception as error:
            told = f"{version.folder} cannot be opened: {graph.file}: {one_line(error)}"
            raise StartError(told) from error

    sizes = {name: version.graph_bytes(graph) for name, graph in shapes.items()}
    names = sorted(shapes, key=lambda name: -sizes[name])  # the largest first: few take most of the time
    count = 1 if sum(sizes.values()) > LARGE_BYTES else threads
    return dict(zip(names, in_threads(open_graph, names, count), strict=True))


def _replay(folder: Path, manifest: Manifest, graphs: dict[str, Session], golden: dict[str, Any]) -> None:
    try:
        replay(manifest, graphs, golden)
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


def tried(
    folder: Path,
    provider: str,
    threads: int,
    max_rows: int,
    rules: LoadRules = LoadRules(),  # noqa: B008  # a tuple
    tell: Tell = tell_nobody,
) -> Tried:
    """Try a version in a process of its own. The arguments are those of `open_model`.

    Raises:
        StartError: It has failed.
    """
    on_cpu = provider == PROVIDERS["cpu"]
    trial = Trial(str(folder), threads, max_rows, rules.memory_bytes, on_cpu, rules.public_keys)

    def heard(line: bytes) -> None:
        tell(f"trial: {one_line(line.decode(errors='replace'))}")

    tell("trial: starting")
    try:
        answer = json.loads(run_module("service.repository.trial", json.dumps(trial), rules.time_s, heard))
    except TookTooLong as error:
        raise StartError(
            f"{trial.folder} was not opened and replayed within the {rules.time_s:g} s of VAE_LOAD_LIMIT_S; raise it, "
            "or export the model again"
        ) from error
    except Killed as error:
        raise StartError(
            f"{trial.folder} ended the process in which it was tried ({error}): it needs more memory than the "
            f"{trial.memory_bytes} bytes of VAE_LOAD_MEMORY_BYTES or than is free, or onnxruntime cannot run it"
        ) from error
    if "refused" in answer:
        raise StartError(answer["refused"])
    timings = [dict(map(tuple, timing)) for timing in answer["timings"]]
    return Tried(answer["digest"], timings, rules.public_keys)
