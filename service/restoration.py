"""Restoration: E[x | y] for what is seen of an image, as composition over a model's graphs.

`fast` is one trip: a recognition model of corrupted images, the decoder, fusion with what was seen. `refined` goes on
from there by variational inference for each image, one step a trip, so that it never holds up short work.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from service import latent
from service.batcher import Arrays
from service.latent import Noise
from service.observation import LEAST_VARIANCE, Observation, Operator, OperatorName, operator_of, projected
from service.refinement import RATE, REFINEMENT_STREAM, STEPS, Ascent, ascend, begin, climb_rows
from service.vae import Compute, Graph, Graphs, Plan, Result, Rows, Submit, decode_draws, drawn_noise, sample_rows

PRIOR_DRAWS = 64
"""Over which the prior's mean is taken, always the same ones."""


# Programs


def recognise_rows(graphs: Graphs, estimated: int | None) -> Compute:
    """y, mask, level -> mean and log_var of q(z | y, mask, level), level.

    estimated: the column of the level to estimate from y first, or None.
    """

    def compute(y: Rows, mask: Rows, level: Rows) -> Arrays:
        if estimated is not None:
            (guess,) = graphs["noise_level"](y, mask)
            level = np.zeros_like(level)
            level[:, estimated] = guess[:, estimated]
        return (*graphs["recognition"](y, mask, level), level)

    return compute


def fuse_rows(graphs: Graphs, name: OperatorName | None, *, completions: bool = False) -> Compute:
    """mean, log_var, y, mask, level[, eps] -> restored, variance[, completions]: decode, fuse with what was seen.

    Over draws, the mean of the restored images and, by the law of total variance, the variance around it; completions
    are the restored images themselves, (n, L, c, h, w).
    """
    fuse = graphs["fusion"] if name is None else _projection(graphs, operator_of(name))

    def compute(mean: Rows, log_var: Rows, y: Rows, mask: Rows, level: Rows, *eps: Rows) -> Arrays:
        z = latent.posterior_draws(mean, log_var, eps[0]) if eps else mean[:, None]
        decoded = decode_draws(graphs, z)
        seen = [np.repeat(array, decoded.shape[1], axis=0) for array in (y, mask, level)]
        fused = fuse(decoded.reshape(-1, *decoded.shape[2:]), *seen)
        restored, variance = (array.reshape(decoded.shape) for array in fused)
        whole = (restored,) if completions else ()
        return restored.mean(1), variance.mean(1) + restored.var(1), *whole

    return compute


def _projection(graphs: Graphs, operator: Operator) -> Graph:
    """As the fusion's graph, for what was seen through an operator."""

    def fuse(x_mean: Rows, y: Rows, _mask: Rows, level: Rows) -> tuple[Rows, ...]:
        unseen = np.zeros_like(x_mean)
        _, variance = graphs["fusion"](x_mean, unseen, unseen, level)  # of a pixel that is not seen: the decoder's
        return projected(operator, x_mean, variance, y, np.square(level[:, 0])[:, None, None, None] + LEAST_VARIANCE)

    return fuse


def denoise_rows(graphs: Graphs, estimated: int | None, *, completions: bool = False) -> Compute:
    """y, mask, level[, eps] -> level, and what `fuse_rows` gives: recognise, decode, fuse, in one trip."""
    recognise, fuse = recognise_rows(graphs, estimated), fuse_rows(graphs, None, completions=completions)

    def compute(y: Rows, mask: Rows, level: Rows, *eps: Rows) -> Arrays:
        mean, log_var, level = recognise(y, mask, level)
        return (level, *fuse(mean, log_var, y, mask, level, *eps))

    return compute


# Operations: what a request does around its trips.


class Wish(NamedTuple):
    """How well to restore, and what to give: see `RestoreOptions`."""

    refined: bool
    draws: int
    uncertainty: bool
    completions: bool


async def restore(
    plan: Plan, submit: Submit, shape: tuple[int, ...], seen: Observation, wish: Wish, noise: Noise
) -> Result:
    """E[x | y] for latents of `shape`, and the level of the noise; with uncertainty, the posterior's deviation too."""
    eps, about = drawn_noise(noise, len(seen.y), wish.draws, shape)
    if seen.operator is None and not wish.refined:
        program = plan("denoise", denoise_rows, wish.draws, seen.estimated, completions=wish.completions)
        trip = await submit(program, (seen.y, seen.mask, seen.level, *eps))
        level, *arrays = trip.arrays
    else:
        trip = await submit(plan("recognise", recognise_rows, 0, seen.estimated), seen.lifted())
        mean, log_var, level = trip.arrays
        if not seen.known:
            seen = seen._replace(level=level)
        if wish.refined:
            settled = noise._replace(seed=about.get("seed", noise.seed))  # one seed repeats both draws and steps
            seed, steps = settled.normal(len(seen.y), (STEPS, mean.shape[1] + level.shape[1]), REFINEMENT_STREAM)
            start = begin(mean, log_var, level.shape[1])
            mean, log_var, bound, level, spent = await _refine(plan, submit, start, seen, steps)
            about, seen = {"seed": seed, "elbo": bound}, seen._replace(level=level)
            trip = spent.after(trip)
        program = plan("fuse", fuse_rows, wish.draws, seen.operator, completions=wish.completions)
        trip = (await submit(program, (mean, log_var, *seen[:3], *eps))).after(trip)
        level, arrays = seen.level, list(trip.arrays)
    outputs = {"images": arrays[0]}
    if wish.uncertainty:
        outputs["std"] = np.sqrt(arrays[1])
    if wish.completions:
        outputs["completions"] = arrays[2]
    found = {} if seen.family is None else {"level": np.ascontiguousarray(level[:, seen.family])}
    return Result(outputs, {**about, **found}, trip)


async def prior_mean(plan: Plan, submit: Submit, noise_shape: tuple[int, ...]) -> tuple[Rows, Rows]:
    """E[x] and the deviation of E[x|z] under the prior, (c, h, w): all that is known where nothing is seen."""
    trip = await submit(plan("sample", sample_rows), (latent.standard_normal(0, PRIOR_DRAWS, noise_shape),))
    return trip.arrays[0].mean(0), trip.arrays[0].std(0)


async def _refine(plan: Plan, submit: Submit, ascent: Ascent, seen: Observation, eps: Rows) -> tuple[Any, ...]:
    """mean, log_var, bound, level and the time, once every row has come to rest or done all its steps."""
    n, latent_dim = len(seen.y), ascent.q.shape[2] - seen.level.shape[1]
    unknown = np.zeros_like(seen.level)
    if seen.estimated is not None:
        unknown[:, seen.estimated] = 1.0
    operators = (np.broadcast_to(part, (n, *part.shape)) for part in seen.through())
    program = plan("refine", climb_rows, 0, "refinement", seen.y.shape[1:], RATE, rounds=STEPS)
    given = (seen.y, seen.mask, seen.level, unknown, *operators)
    ascent, (bound, level), spent = await ascend(submit, program, ascent, eps, given)
    mean, log_var = (np.ascontiguousarray(part) for part in ascent.q[..., :latent_dim].swapaxes(0, 1))
    return mean, log_var, bound, level, spent
