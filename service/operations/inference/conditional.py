"""Restoration by a conditional model, whose graph `restoration` gives E[x | y] and whose graph `completion` draws x.

`fast` is one trip. `refined` takes several at low priority: without mask and operator the mean over the flips and
rotations of the image, else half-quadratic splitting, in which the graph is the prior of a linear inverse problem. For
missing pixels and behind a blur `fast` takes a few such steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from service.contract.corruption import (
    LEAST_VARIANCE,
    Blocks,
    Observation,
    Operator,
    OperatorName,
    blocks_of,
    operator_of,
    projected,
)
from service.contract.graphs import Axis, at_size
from service.contract.images import to_floats
from service.operations.inference.latent import Noise
from service.operations.inference.restoration import RestoreChoices
from service.operations.inference.vae import Observe, Result, Rows, drawn_noise
from service.runtime.model import Model
from service.runtime.program import Arrays, Compute, Graphs, ModelProgram, Submit, Trip

TURNS = 8
"""Flips and rotations of an image."""
TRANSPOSED = 4
"""The turns from this one on swap height and width."""
WEIGHT = 0.23
"""Weight of the prior in half-quadratic splitting."""


class Schedule(NamedTuple):
    """How half-quadratic splitting goes on: from the first level of the prior to the last, evenly in the logarithm.

    Attributes:
        fast: Steps for `fast`.
        refined: Steps for `refined`.
        first: The first level.
        last: The last one.

    Source:
        Zhang et al. (2021), "Plug-and-play image restoration with deep denoiser prior", section 4.2.
    """

    fast: int
    refined: int
    first: float
    last: float


BLURRED = Schedule(8, 24, 49 / 255, 2 / 255)
"""Of blurred images, which begins with what was sent."""
BEGUN = Schedule(4, 10, 15 / 255, 2 / 255)
"""Of missing pixels and of means of blocks, which begins with E[x | y]: a higher first level would spoil it again, by
0.7 dB for blocks and up to 3 for missing pixels (photo, photographs of photos/dev). Where half the pixels are missing,
4 steps gain 2.6 dB and 12 steps 3.7. More steps smooth what no pixel beside it tells: 24 lose 2 dB in a hole of 24
pixels, and 0.5 dB of means of 2 x 2 blocks."""


# Programs


def restoration_rows(graphs: Graphs, name: OperatorName | None, *, uncertainty: bool, completions: bool) -> Compute:
    """y, mask, level[, eps (n, L, *latent)] -> restored[, variance][, completions (n, L, c, h, w)].

    With draws, `restored` is the mean of the completions, and its variance follows from the law of total variance.
    Where y holds means of blocks without noise, all images are made to agree with them.
    """
    blocks = blocks_of(name)
    assert blocks is not None  # a blur is split

    def compute(y: Rows, mask: Rows, level: Rows, *eps: Rows) -> Arrays:
        lifted = (*blocks.lifted(y, mask), level)
        restored, variance, features = graphs["restoration"](*lifted)

        def agreed(x: Rows, spread: Rows) -> Rows:
            return x if name is None else agreeing(blocks, x, spread, y, mask, noise_of(level))

        if not eps:
            return (agreed(restored, variance), *((variance,) if uncertainty else ()))
        kept: list[Rows] = []
        mean, within, between = (np.zeros_like(restored) for _ in range(3))
        for k in range(eps[0].shape[1]):  # one after the other: the features of one draw are as large as its image
            x, spread, *_ = graphs["completion"](*lifted, restored, features, np.ascontiguousarray(eps[0][:, k]))
            x = agreed(x, spread)
            step = x - mean
            mean = mean + step / np.float32(k + 1)
            between, within = between + step * (x - mean), within + spread
            kept += [x] if completions else []
        total = (within + between) / np.float32(eps[0].shape[1])
        return (mean, *((total,) if uncertainty else ()), *((np.stack(kept, 1),) if completions else ()))

    return compute


def latent_rows(graphs: Graphs, latent_axes: tuple[Axis, ...]) -> Compute:
    """y, mask, level[, eps (n, L, *latent)] -> mean, log_var of p(z|y) at noise 0[, draws z (n, L, *latent)]."""

    def compute(y: Rows, mask: Rows, level: Rows, *eps: Rows) -> Arrays:
        restored, _, features = graphs["restoration"](y, mask, level)
        given = (y, mask, level, restored, features)
        middle = np.zeros((len(y), *at_size(latent_axes, *y.shape[-2:])), np.float32)
        _, _, _, mean, log_var, _ = graphs["completion"](*given, middle)
        draws = range(eps[0].shape[1]) if eps else ()
        z = [graphs["completion"](*given, np.ascontiguousarray(eps[0][:, k]))[2] for k in draws]
        return (mean, log_var, *((np.stack(z, 1),) if z else ()))

    return compute


def turned_rows(graphs: Graphs, turn: int) -> Compute:
    """y, mask, level -> restored and variance, computed of the turned image and turned back."""

    def compute(y: Rows, mask: Rows, level: Rows) -> Arrays:
        found = graphs["restoration"](_turned(y, turn), _turned(mask, turn), level)
        return tuple(_turned(array, turn, back=True) for array in found[:2])

    return compute


def split_rows(graphs: Graphs, name: OperatorName | None, *, last: bool) -> Compute:
    """x, y, mask, level, spread, noise -> restored, variance: one step of half-quadratic splitting.

    The posterior of N(x, spread) given y is restored as an image with noise of that level. In the last step the answer
    is made to agree with y.
    """
    blocks = blocks_of(name)
    operator = operator_of(name) if blocks is None and name is not None else blocks
    assert operator is not None

    def compute(x: Rows, y: Rows, mask: Rows, level: Rows, spread: Rows, noise: Rows) -> Arrays:
        noise = noise[:, None, None, None]
        near = np.broadcast_to(spread[:, None, None, None], x.shape)
        z, _ = projected(operator, x, near, y, mask, noise)
        restored, variance, _ = graphs["restoration"](z, np.ones_like(z), level)
        return (agreeing(operator, restored, variance, y, mask, noise) if last else restored), variance

    return compute


def agreeing(operator: Operator | Blocks, x: Rows, variance: Rows, y: Rows, mask: Rows, noise: Rows) -> Rows:
    """x, brought into agreement with y in rows without noise: what a network is off then is its error.

    Where there is noise, x has taken y into account, and must not do so again.
    """
    exact = noise <= np.float32(2.0 * LEAST_VARIANCE)
    if not exact.any():
        return x
    alone = isinstance(operator, Blocks) and operator.factor == 1
    found = np.where(mask > 0, y, x) if alone else projected(operator, x, variance, y, mask, noise)[0]
    return found if exact.all() else np.where(exact, found, x)


def noise_of(level: Rows) -> Rows:
    """Variance (n, 1, 1, 1) of the noise of these levels (n, F) together."""
    found: Rows = np.square(level).sum(1)[:, None, None, None] + np.float32(LEAST_VARIANCE)
    return found


def _turned(x: Rows, turn: int, *, back: bool = False) -> Rows:
    """Images (..., h, w) after one of the `TURNS`, or before it."""
    flips = tuple(slice(None, None, -1 if turn & bit else None) for bit in (2, 1))
    if back and turn >= TRANSPOSED:
        x = x.swapaxes(-1, -2)
    x = x[..., flips[0], flips[1]]
    if turn >= TRANSPOSED and not back:
        x = x.swapaxes(-1, -2)
    return np.ascontiguousarray(x)


# Around the programs: noise, submission, names.


async def restore(
    model: Model, submit: Submit, seen: Observation, choices: RestoreChoices, noise: Noise, observe: Observe | None
) -> Result:
    """E[x | y]; with uncertainty, the standard deviation of the posterior too.

    Args:
        model: A model with the graph `restoration`.
        submit: Submits a program.
        seen: The observation, of known levels.
        choices: How to restore: a `RestoreChoices`.
        noise: The request's noise.
        observe: Called after every step of work in several steps.
    """
    splitting = blocks_of(seen.operator) is None or (choices.masked and not choices.draws)
    if choices.refined or splitting:
        turning = seen.operator is None and not choices.masked
        steps = await (_ensemble if turning else _split)(model, submit, seen, choices, observe)
        return _named(steps.arrays, {}, steps, choices)
    eps, about = drawn_noise(noise, len(seen.y), choices.draws, model.latent_at(*seen.size) if choices.draws else ())
    program = _one_pass(
        model, seen.operator, choices.draws, uncertainty=choices.uncertainty, completions=choices.completions
    )
    trip = await submit(program, (seen.y, seen.mask, seen.level, *eps))
    return _named(trip.arrays, about, trip, choices)


def _one_pass(
    model: Model, operator: OperatorName | None, draws: int = 0, *, uncertainty: bool = False, completions: bool = False
) -> ModelProgram:
    """The program of `restoration_rows`, for means of blocks or no operator."""
    return model.plan(
        "restore",
        restoration_rows,
        draws,
        _of_all_sizes(operator),
        images=(0, 1 + uncertainty) if completions else (0,),
        block=1 if operator is None else int(operator[1]),
        uncertainty=uncertainty,
        completions=completions,
    )


def _of_all_sizes(operator: OperatorName | None) -> OperatorName | None:
    """The operator's name without the size of images, so that all sizes share a program; a blur's has it."""
    return operator if operator is None or blocks_of(operator) is None else (*operator[:2], 0, 0)


async def encode(model: Model, submit: Submit, seen: Observation, draws: int, noise: Noise) -> Result:
    """mean and log_var of p(z|y) of an observation of known levels; with draws, latents (n, L, *latent) from it."""
    eps, about = drawn_noise(noise, len(seen.y), draws, model.latent_at(*seen.size) if draws else ())
    program = model.plan("encode", latent_rows, draws, model.latent_axes)
    trip = await submit(program, (seen.y, seen.mask, seen.level, *eps))
    names = ("mean", "log_var", *(("latents",) if draws else ()))
    return Result(dict(zip(names, trip.arrays, strict=True)), about, trip)


def _named(arrays: Arrays, about: dict[str, Any], trip: Trip, choices: RestoreChoices) -> Result:
    """The outputs by name; the variance becomes a standard deviation."""
    names = ("images", *(("std",) if choices.uncertainty else ()), *(("completions",) if choices.completions else ()))
    outputs = dict(zip(names, arrays, strict=False))
    if "std" in outputs:
        outputs["std"] = np.sqrt(np.maximum(outputs["std"], 0.0))
    return Result(outputs, about, trip)


async def _ensemble(
    model: Model, submit: Submit, seen: Observation, choices: RestoreChoices, observe: Observe | None
) -> Trip:
    """Mean and mean variance over the flips and rotations of the image, of which the answer should not depend."""
    square = model.manifest.size is not None or seen.size[0] == seen.size[1]
    turns, spent = TURNS if square else TRANSPOSED, Trip((), 0.0, 0.0)
    total: list[Any] = []
    for turn in range(turns):
        program = model.plan("turn", turned_rows, 0, turn, rounds=turns)
        trip = await _begun(submit, program, (seen.y, seen.mask, seen.level), turn)
        spent = trip.after(spent)
        total = [a + b for a, b in zip(total, trip.arrays, strict=True)] if total else list(trip.arrays)
        if observe is not None:
            shown = {"images": total[0] / np.float32(turn + 1)} if choices.preview else {}
            observe(Result(shown, {"step": turn + 1, "steps": turns}, spent))
    return spent._replace(arrays=tuple(part / np.float32(turns) for part in total))


async def _split(
    model: Model, submit: Submit, seen: Observation, choices: RestoreChoices, observe: Observe | None
) -> Trip:
    """Half-quadratic splitting: in turn the posterior under the observation alone, and its restoration.

    Source:
        Zhang et al. (2021), equations 6 and 7.
    """
    blurred = blocks_of(seen.operator) is None
    schedule = BLURRED if blurred else BEGUN
    steps = schedule.refined if choices.refined else schedule.fast
    x, variance, spent = await _beginning(model, submit, seen)
    noise = np.square(seen.total) + np.float32(LEAST_VARIANCE)
    last = np.maximum(seen.total, np.float32(schedule.last))
    first = np.maximum(last, np.float32(schedule.first))
    operator = _of_all_sizes(seen.operator)
    gaussian = model.manifest.noise_families.index("gaussian")
    for k in range(steps):
        sigma = (first * (last / first) ** np.float32(k / (steps - 1))).astype(np.float32)
        level = np.zeros_like(seen.level)
        level[:, gaussian] = sigma
        program = model.plan("split", split_rows, 0, operator, rounds=steps, local=not blurred, last=k == steps - 1)
        arrays = (x, seen.y, seen.mask, level, np.square(sigma) / np.float32(WEIGHT), noise)
        trip = await _begun(submit, program, arrays, k)
        (x, of_step), spent = trip.arrays, trip.after(spent)
        if observe is not None:
            observe(Result({"images": x} if choices.preview else {}, {"step": k + 1, "steps": steps}, spent))
    return spent._replace(arrays=(x, of_step if variance is None else variance))


async def _beginning(model: Model, submit: Submit, seen: Observation) -> tuple[Rows, Rows | None, Trip]:
    """Where splitting begins: at E[x | y], with the variance of x given y, or behind a blur at what was sent."""
    if blocks_of(seen.operator) is None:
        return to_floats(seen.y), None, Trip((), 0.0, 0.0)
    trip = await submit(_one_pass(model, seen.operator, uncertainty=True), (seen.y, seen.mask, seen.level))
    return trip.arrays[0], trip.arrays[1], trip


async def _begun(submit: Submit, program: ModelProgram, arrays: Arrays, step: int) -> Trip:
    """Run a step; a full queue may refuse the first one alone."""
    return await submit(program, arrays, **({"begun": True} if step else {}))
