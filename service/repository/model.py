"""One version of a model: tried in a confined process, then opened, replayed and served."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from service.contract import manifest as manifests
from service.contract.golden import archive_bytes, deviation, read_golden
from service.contract.manifest import MAX_FILE_BYTES, File, Golden, Graph, Manifest, ManifestError
from service.errors import StartError, one_line
from service.operations.inference.vae import Compute
from service.repository.confined import Killed, TookTooLong, run_module
from service.runtime.batcher import Arrays
from service.runtime.session import PROVIDERS, Session
from service.runtime.thread import in_threads

TIMINGS, TIMING_S = 3, 0.02
"""How often, and for about how long at most, a batch of one size is timed."""
HAND_OVER_S = 2e-4
"""About what a batch costs beside its computation: the way to the thread and back."""
WORTH = 1.1
"""A larger batch must be cheaper a row by this."""
OWN_THREAD = ("refinement", "elbo_gradient", "log_joint")
"""Graphs of long work: onnxruntime's threads would not give way to others as the one that calls it does."""
MOST_PROGRAMS = 256
"""Programs that a model remembers: a stranger can name any blur."""
MOST_REFINED = 16
"""Rows that a step of refinement is measured with at most."""
Timing = dict[int, float]
"""Seconds by number of rows."""


@dataclass(eq=False)
class ModelProgram:
    """A program of one model. `weight` is what a row counts for in a batch: the draws it is decoded at, or 1.

    rounds: into how many slices it is cut. timing: seconds by number of rows, None while unmeasured. clock: what it is
    timed by.
    """

    model: str
    operation: str
    weight: int
    compute: Compute
    rounds: int = 1
    timing: Timing | None = None
    clock: Callable[[], float] = time.perf_counter

    def run(self, *arrays: Any) -> Arrays:
        """Compute the rows."""
        return self.compute(*arrays)

    def batch_rows(self, max_rows: int) -> int:
        """As few as cost hardly more a row than `max_rows` do: the next batch's HTTP is done while this one runs."""
        if self.timing is None:
            return max(1, max_rows // self.weight)
        return min(max_rows, self._enough)

    def cost_s(self, rows: int) -> float:
        """From the warm-up's measurements; unmeasured is dear."""
        if self.timing is None:
            return math.inf
        one, further = self._line
        return one + (rows - 1) * further

    def measure(self, rows: int, *row: Any) -> None:
        """Time one row, four, sixteen and so on up to `rows`, for as long as larger batches pay."""
        self.timing = {}
        size = 1
        while size <= rows and self._still_pays:
            batch = tuple(np.repeat(array[:1], size, axis=0) for array in row)
            self.timing[size] = self._time(batch)
            size = min(4 * size, rows) if size < rows else rows + 1

    @property
    def _still_pays(self) -> bool:
        """Whether the last size measured was cheaper a row than the one before."""
        earlier, last = [math.inf, math.inf, *self._a_row.values()][-2:]
        return earlier == math.inf or last * WORTH < earlier

    @cached_property
    def _line(self) -> tuple[float, float]:
        """Seconds of one row, and of each further one."""
        assert self.timing is not None
        rows, one = max(self.timing), self.timing[1]
        return one, max(0.0, self.timing[rows] - one) / max(1, rows - 1)

    @cached_property
    def _enough(self) -> int:
        return next(size for size, seconds in self._a_row.items() if seconds <= WORTH * min(self._a_row.values()))

    @property
    def _a_row(self) -> dict[int, float]:
        """Seconds a row, by number of rows."""
        assert self.timing is not None
        return {size: (seconds + HAND_OVER_S) / size for size, seconds in self.timing.items()}

    def _time(self, arrays: Arrays) -> float:
        """The best of a few, of fewer where each takes long."""
        began, best = self.clock(), math.inf
        for _ in range(TIMINGS):
            started = self.clock()
            self.compute(*arrays)
            best = min(best, self.clock() - started)
            if self.clock() - began > TIMING_S:
                break
        return best


@dataclass(eq=False)
class Model:
    """One version, ready to serve."""

    manifest: Manifest
    graphs: Mapping[str, Session]
    programs: dict[tuple[Any, ...], ModelProgram] = field(default_factory=dict)

    @cached_property
    def input_shape(self) -> tuple[int, ...]:
        """(c, h, w)."""
        return tuple(self.manifest.input_shape)

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one latent."""
        return tuple(self.manifest.latent_shape)

    @cached_property
    def noise_shape(self) -> tuple[int, ...]:
        """The shape of the standard normal noise that one draw from the prior takes."""
        prior = self.manifest.graphs.get("prior")
        return self.latent_shape if prior is None else tuple(prior.inputs["eps"])

    def plan(
        self, operation: str, rows: Any, draws: int = 0, *choices: Any, rounds: int = 1, **further: Any
    ) -> ModelProgram:
        """The program that computes `operation` with these static choices; the same object while it is remembered.

        rounds: into how many slices its work is cut; more than one makes it long work.
        One that has not been measured counts as costing what the first of its operation costs at as many draws.
        """
        key = (operation, draws, rounds, *choices, *further.items())
        program = self.programs.get(key)
        if program is None:
            if len(self.programs) >= MOST_PROGRAMS:  # the oldest but those that were warmed
                del self.programs[next(islice(self.programs, MOST_PROGRAMS // 2, None))]
            compute = rows(self.graphs, *choices, **further)
            alike = (
                known.timing
                for (name, drawn, *_), known in self.programs.items()
                if (name, drawn) == (operation, draws)
            )
            program = ModelProgram(self.manifest.name, operation, max(1, draws), compute, rounds, next(alike, None))
            self.programs[key] = program
        return program

    def replay(self, golden: Mapping[str, Any]) -> None:
        """Run every graph on its golden rows, singly and together.

        Raises: StartError naming the graph that answers otherwise on this machine.
        """
        for name, graph in self.manifest.graphs.items():
            rows = [golden[f"{name}/{key}"] for key in graph.inputs]
            for size in (1, len(rows[0])):
                answers = self.graphs[name](*(row[:size] for row in rows))
                for key, answer in zip(graph.outputs, answers, strict=True):
                    self._compare(name, key, answer, golden[f"{name}/{key}"][:size])

    def _compare(self, graph: str, key: str, answer: Any, known: Any) -> None:
        of = f"model {self.manifest.name} version {self.manifest.version}: {graph}"
        if answer.shape != known.shape or answer.dtype != known.dtype:
            raise StartError(
                f"{of} gives {key} as {answer.dtype} of shape {list(answer.shape)}, not as {known.dtype} of shape "
                f"{list(known.shape)} as its golden vectors; export the model again"
            )
        error = deviation(key, answer, known)
        if not error <= self.manifest.golden.tolerance:
            raise StartError(
                f"{of} is off its golden vectors by {error:.2g} (at most {self.manifest.golden.tolerance:g}) on this "
                "machine"
            )

    def warm(self, golden: Mapping[str, Any], max_rows: int) -> list[Timing]:
        """Run and time the programs that warm-up requests submit; returns the timings."""
        timings = []
        for program, rows, arrays in self._usual(golden, max_rows):
            program.measure(rows, *arrays)
            assert program.timing is not None
            timings.append(program.timing)
        return timings

    def take_timings(self, golden: Mapping[str, Any], max_rows: int, timings: Sequence[Timing]) -> None:
        """Timings that `warm` has given of the same version elsewhere on this machine."""
        for (program, _, _), timing in zip(self._usual(golden, max_rows), timings, strict=True):
            program.timing = timing

    def _usual(self, golden: Mapping[str, Any], max_rows: int) -> Iterator[tuple[ModelProgram, int, Arrays]]:
        """Each program that warm-up requests submit, the rows of its largest batch, and its inputs.

        The caller sets a program's timing before it asks for the next one, which may take the same timing.
        """
        from service.operations.registry import warm_up  # noqa: PLC0415  # operations import this module

        for program, arrays in warm_up(self, golden):
            if program.timing is None:
                yield program, MOST_REFINED if program.rounds > 1 else max(1, max_rows // program.weight), arrays


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
            model.take_timings(version.golden, max_rows, timings)
        else:
            model.warm(version.golden, max_rows)
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
