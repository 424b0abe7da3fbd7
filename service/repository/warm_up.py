"""Warm-up: the programs that requests without options need, run and timed before a version serves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from service.operations.inference.refinement import NEARBY_RATE, RATE, STEPS, climb_rows
from service.operations.inference.restoration import denoise_rows
from service.operations.inference.scoring import DRAWS, weigh_rows
from service.operations.inference.vae import decode_rows, encode_rows, reconstruct_rows, sample_rows
from service.runtime.model import Model
from service.runtime.program import Arrays, ModelProgram, Timing

MOST_REFINED = 16
"""Rows of the largest batch with which a step of refinement is timed."""


def warm(model: Model, golden: Mapping[str, Any], max_rows: int) -> list[Timing]:
    """Run and time the usual programs.

    Args:
        model: The model.
        golden: Its golden vectors, by `graph/tensor`.
        max_rows: Rows of the largest batch.

    Returns:
        The timings, in the order of the programs.
    """
    timings = []
    for program, rows, arrays in _usual(model, golden, max_rows):
        program.measure(rows, *arrays)
        assert program.timing is not None
        timings.append(program.timing)
    return timings


def take_timings(model: Model, golden: Mapping[str, Any], max_rows: int, timings: Sequence[Timing]) -> None:
    """Use the timings that `warm` measured of the same version in another process on this machine."""
    for (program, _, _), timing in zip(_usual(model, golden, max_rows), timings, strict=True):
        program.timing = timing


def _usual(model: Model, golden: Mapping[str, Any], max_rows: int) -> Iterator[tuple[ModelProgram, int, Arrays]]:
    """Each program that is timed, the rows of its largest batch, and its inputs with at least one row.

    The caller sets a program's timing before it asks for the next one, which may take the same timing.
    """
    x, z = golden["encoder/x"], golden["decoder/z"]
    yield model.plan("encode", encode_rows), max_rows, (x,)
    yield model.plan("decode", decode_rows), max_rows, (z,)
    yield model.plan("reconstruct", reconstruct_rows), max_rows, (x,)
    yield model.plan("sample", sample_rows), max_rows, (golden["prior/eps"] if "prior" in model.graphs else z,)
    if "recognition" in model.graphs:
        seen = tuple(golden[f"recognition/{key}"] for key in ("y", "mask", "level"))
        yield model.plan("denoise", denoise_rows, 0, 0, completions=False), max_rows, seen
        model.plan("denoise", denoise_rows, 0, None, completions=False)  # nearly the same work, so the same timing
    if "log_joint" in model.graphs:
        x, z = golden["log_joint/x"], golden["log_joint/z"]
        eps = np.zeros((len(z), DRAWS, *z.shape[1:]), np.float32)
        yield model.plan("weigh", weigh_rows, DRAWS), max(1, max_rows // DRAWS), (x, z, np.zeros_like(z), eps)
    for operation, graph, rate in (("refine", "refinement", RATE), ("climb", "elbo_gradient", NEARBY_RATE)):
        if graph in model.graphs:
            yield _ascent(model, operation, graph, rate, golden)


def _ascent(
    model: Model, operation: str, graph: str, rate: float, golden: Mapping[str, Any]
) -> tuple[ModelProgram, int, Arrays]:
    mean, log_var, eps, *given = (golden[f"{graph}/{key}"] for key in model.manifest.graphs[graph].inputs)
    zero = np.zeros((len(mean), 2, mean.shape[1]), np.float32)
    ascent = (np.stack([mean, log_var], 1), zero, zero, np.zeros(len(mean), np.int64))
    program = model.plan(operation, climb_rows, 0, graph, given[0].shape[1:], rate, rounds=STEPS)
    return program, MOST_REFINED, (*ascent, eps, *given)
