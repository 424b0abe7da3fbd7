"""Warm-up: the programs that requests without options need, run and timed before a version serves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from service.operations.registry import warm_up
from service.runtime.model import Model
from service.runtime.program import Arrays, ModelProgram, Timing

MOST_REFINED = 16
"""Rows of the largest batch with which a step of refinement is timed."""


def warm(model: Model, golden: Sequence[Mapping[str, Any]], max_rows: int) -> list[Timing]:
    """Run and time the usual programs.

    Args:
        model: The model.
        golden: Golden vectors of each of its variants, by `graph/tensor`.
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


def take_timings(model: Model, golden: Sequence[Mapping[str, Any]], max_rows: int, timings: Sequence[Timing]) -> None:
    """Use the timings that `warm` measured of the same version in another process on this machine."""
    for (program, _, _), timing in zip(_usual(model, golden, max_rows), timings, strict=True):
        program.timing = timing


def _usual(
    model: Model, golden: Sequence[Mapping[str, Any]], max_rows: int
) -> Iterator[tuple[ModelProgram, int, Arrays]]:
    """Each program that the operations' warm-up requests submit, the rows of its largest batch, and its inputs.

    The caller sets a program's timing before it asks for the next one, which may take the same timing.
    """
    variants = zip(model.variants.values(), golden, strict=True)
    for program, arrays in chain.from_iterable(warm_up(variant, known) for variant, known in variants):
        if program.timing is None:
            yield program, MOST_REFINED if program.rounds > 1 else max(1, max_rows // program.weight), arrays
