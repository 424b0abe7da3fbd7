"""One version of a model: digests checked, graphs opened, golden vectors replayed, warmed."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from service import manifest as manifests
from service.batcher import Arrays
from service.errors import StartError
from service.golden import deviation
from service.manifest import Manifest, ManifestError
from service.refinement import NEARBY_RATE, RATE, STEPS, climb_rows
from service.restoration import denoise_rows
from service.scoring import DRAWS, weigh_rows
from service.session import Session
from service.vae import Compute, decode_rows, encode_rows, reconstruct_rows, sample_rows

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


@dataclass(eq=False)
class ModelProgram:
    """A program of one model. `weight` is what a row counts for in a batch: the draws it is decoded at, or 1.

    rounds: into how many slices it is cut. timing: seconds by number of rows, None while unmeasured.
    """

    model: str
    operation: str
    weight: int
    compute: Compute
    rounds: int = 1
    timing: dict[int, float] | None = None

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
        began, best = time.perf_counter(), math.inf
        for _ in range(TIMINGS):
            started = time.perf_counter()
            self.compute(*arrays)
            best = min(best, time.perf_counter() - started)
            if time.perf_counter() - began > TIMING_S:
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
                    known = golden[f"{name}/{key}"][:size]
                    error = deviation(key, answer, known)
                    if not error <= self.manifest.golden.tolerance:
                        raise StartError(
                            f"model {self.manifest.name} version {self.manifest.version}: {name} is off its golden "
                            f"vectors by {error:.2g} (at most {self.manifest.golden.tolerance:g}) on this machine"
                        )

    def warm(self, golden: Mapping[str, Any], max_rows: int) -> None:
        """Run and time the programs that requests without options need."""
        x, z = golden["encoder/x"], golden["decoder/z"]
        self.plan("encode", encode_rows).measure(max_rows, x)
        self.plan("decode", decode_rows).measure(max_rows, z)
        self.plan("reconstruct", reconstruct_rows).measure(max_rows, x)
        self.plan("sample", sample_rows).measure(max_rows, golden["prior/eps"] if "prior" in self.graphs else z)
        if "recognition" in self.graphs:
            seen = [golden[f"recognition/{key}"] for key in ("y", "mask", "level")]
            self.plan("denoise", denoise_rows, 0, 0, completions=False).measure(max_rows, *seen)
            self.plan("denoise", denoise_rows, 0, None, completions=False)  # nearly the same, and taken to cost as much
        if "log_joint" in self.graphs:
            x, z = golden["log_joint/x"], golden["log_joint/z"]
            eps = np.zeros((len(z), DRAWS, *z.shape[1:]), np.float32)
            self.plan("weigh", weigh_rows, DRAWS).measure(max(1, max_rows // DRAWS), x, z, np.zeros_like(z), eps)
        for operation, graph, rate in (("refine", "refinement", RATE), ("climb", "elbo_gradient", NEARBY_RATE)):
            if graph in self.graphs:
                self._warm_ascent(operation, graph, rate, golden)

    def _warm_ascent(self, operation: str, graph: str, rate: float, golden: Mapping[str, Any]) -> None:
        mean, log_var, eps, *given = (golden[f"{graph}/{key}"] for key in self.manifest.graphs[graph].inputs)
        zero = np.zeros((len(mean), 2, mean.shape[1]), np.float32)
        ascent = (np.stack([mean, log_var], 1), zero, zero, np.zeros(len(mean), np.int64))
        program = self.plan(operation, climb_rows, 0, graph, given[0].shape[1:], rate, rounds=STEPS)
        program.measure(MOST_REFINED, *ascent, eps, *given)


def open_model(folder: Path, provider: str, threads: int, max_rows: int) -> Model:
    """Read, check, open, replay and warm one version.

    Raises: StartError.
    """
    try:
        manifest = manifests.read(folder)
    except ManifestError as error:
        raise StartError(str(error)) from error
    if (manifest.name, manifest.version) != (folder.parent.name, folder.name):
        raise StartError(f"{folder} holds version {manifest.version} of {manifest.name}; name the folders after them")
    content = {name: _checked(folder, graph.file, graph.sha256) for name, graph in manifest.graphs.items()}
    golden_content = _checked(folder, manifest.golden.file, manifest.golden.sha256)
    try:
        graphs = _opened(content, provider, threads)
        with np.load(io.BytesIO(golden_content), allow_pickle=False) as file:
            golden = dict(file)
        model = Model(manifest, graphs)
        model.replay(golden)
        model.warm(golden, max_rows)
    except StartError:
        raise
    except Exception as error:
        raise StartError(f"{folder} cannot be opened: {error}") from error
    return model


def _opened(content: Mapping[str, bytes], provider: str, threads: int) -> dict[str, Session]:
    """Every graph's session, as many at a time as there are threads, the largest first: few take most of the time."""

    def session(name: str) -> Session:
        return Session(content[name], provider, 1 if name in OWN_THREAD else threads)

    names = sorted(content, key=lambda name: -len(content[name]))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        return dict(zip(names, pool.map(session, names), strict=True))


def _checked(folder: Path, file: str, sha256: str) -> bytes:
    """A file's content, read once, so that what was digested is what is opened."""
    path = folder / file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}; export the model again") from error
    if manifests.digest(content) != sha256:
        raise StartError(f"{path} does not match the SHA-256 in its manifest; it was changed after the export")
    return content
