"""Restoration: E[x | y] for an observation y of an image, composed of a model's graphs.

`fast` is one trip: a recognition model of corrupted images, the decoder, fusion with the observation, correction.
`refined` continues from recognition by variational inference for each image, one step a trip.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from service.contract.corruption import LEAST_VARIANCE, Observation, OperatorName, operator_of, projected
from service.operations.inference import latent
from service.operations.inference.latent import Noise
from service.operations.inference.levels import LEAST_LEVEL, MOST_LEVEL, level_rows
from service.operations.inference.refinement import (
    RATE,
    REFINEMENT_STREAM,
    STEPS,
    Ascent,
    Waypoint,
    ascend,
    begin,
    climb_rows,
)
from service.operations.inference.vae import Observe, Result, Rows, decode_draws, drawn, drawn_noise
from service.runtime.model import Model
from service.runtime.program import Arrays, Compute, Graphs, Submit, Trip

PRIOR_DRAWS = 64
"""Draws for the prior's mean, always the same ones."""


# Programs


def recognise_rows(graphs: Graphs, estimated: int | None) -> Compute:
    """y, mask, level -> mean and log_var of q(z | y, mask, level), level, as `level_rows` gives it."""
    estimate = level_rows(graphs, estimated)

    def compute(y: Rows, mask: Rows, level: Rows) -> Arrays:
        (level,) = estimate(y, mask, level)
        return (*graphs["recognition"](y, mask, level), level)

    return compute


def fuse_rows(graphs: Graphs, name: OperatorName | None, *, completions: bool = False) -> Compute:
    """mean, log_var, y, mask, level[, eps] -> restored, variance[, completions]: decode, fuse, correct.

    With draws, correction takes the mean of the fused images and their variance by the law of total variance;
    completions are the fused images themselves, (n, L, c, h, w). An observation through an operator comes last: Bayes'
    rule makes the answer agree with it.
    """
    operator = None if name is None else operator_of(name)

    def compute(mean: Rows, log_var: Rows, y: Rows, mask: Rows, level: Rows, *eps: Rows) -> Arrays:
        z = latent.posterior_draws(mean, log_var, eps[0]) if eps else mean[:, None]
        decoded = decode_draws(graphs, z)
        lifted = (y, mask, level) if operator is None else (*operator.lifted(y, mask), level)
        repeated = [np.repeat(array, decoded.shape[1], axis=0) for array in lifted]
        each = graphs["fusion"](decoded.reshape(-1, *decoded.shape[2:]), *repeated)
        fused, variance = (array.reshape(decoded.shape) for array in each)
        restored = graphs["correction"](fused.mean(1), variance.mean(1) + fused.var(1), *lifted)
        if operator is not None:
            noise = np.square(level[:, 0])[:, None, None, None] + np.float32(LEAST_VARIANCE)
            restored = projected(operator, restored[0], restored[1], y, mask, noise)
            if completions:
                seen = [np.repeat(array, decoded.shape[1], axis=0) for array in (y, mask, noise)]
                fused = projected(operator, each[0], each[1], seen[0], seen[1], seen[2])[0].reshape(decoded.shape)
        return (*restored, *((fused,) if completions else ()))

    return compute


def denoise_rows(graphs: Graphs, estimated: int | None, *, completions: bool = False) -> Compute:
    """y, mask, level[, eps] -> level, and what `fuse_rows` gives: recognise, decode, fuse, correct, in one trip."""
    recognise, fuse = recognise_rows(graphs, estimated), fuse_rows(graphs, None, completions=completions)

    def compute(y: Rows, mask: Rows, level: Rows, *eps: Rows) -> Arrays:
        mean, log_var, level = recognise(y, mask, level)
        return (level, *fuse(mean, log_var, y, mask, level, *eps))

    return compute


# Around the programs: noise, submission, names.


class RestoreChoices(NamedTuple):
    """How to restore, and what to return: see `RestoreOptions`; and whether the request has a mask."""

    refined: bool
    draws: int
    uncertainty: bool
    completions: bool
    preview: bool = False
    masked: bool = False


async def restore(
    model: Model,
    submit: Submit,
    seen: Observation,
    choices: RestoreChoices,
    noise: Noise,
    observe: Observe | None = None,
) -> Result:
    """E[x | y] and the level of the noise; with uncertainty, the standard deviation of the posterior too.

    Args:
        model: The model.
        submit: Submits a program.
        seen: The observation.
        choices: How to restore.
        noise: The request's noise.
        observe: Called after every window of a refinement; with a preview, with the images so far.
    """
    seed, noise = noise.settled()  # one seed repeats both draws and steps
    shape = model.latent_at(*seen.size) if choices.draws else ()
    eps, about = drawn_noise(noise, len(seen.y), choices.draws, shape)
    if seen.operator is None and not choices.refined:
        images = (1, 3) if choices.completions else (1,)
        program = model.plan(
            "denoise", denoise_rows, choices.draws, seen.estimated, images=images, completions=choices.completions
        )
        trip = await submit(program, (seen.y, seen.mask, seen.level, *eps))
        level, *arrays = trip.arrays
    else:
        trip = await submit(model.plan("recognise", recognise_rows, 0, seen.estimated), seen.lifted())
        mean, log_var, level = trip.arrays
        if not seen.known:
            seen = seen._replace(level=level)
        if choices.refined:
            _, steps = noise.normal(len(seen.y), (STEPS, mean.shape[1] + level.shape[1]), REFINEMENT_STREAM)
            start = begin(mean, log_var, level.shape[1])
            mean, log_var, bound, level, spent = await _refine(
                model, submit, start, seen, steps, observe, preview=choices.preview
            )
            about, seen = {"seed": seed, "elbo": bound}, seen.with_level(level, LEAST_LEVEL, MOST_LEVEL)
            trip = spent.after(trip)
        fused = await _fused(model, submit, seen, mean, log_var, eps, completions=choices.completions)
        trip = fused.after(trip)
        level, arrays = seen.level, list(trip.arrays)
    outputs = {"images": arrays[0]}
    if choices.uncertainty:
        outputs["std"] = np.sqrt(arrays[1])
    if choices.completions:
        outputs["completions"] = arrays[2]
    found = {} if seen.family is None else {"level": np.ascontiguousarray(level[:, seen.family])}
    return Result(outputs, {**about, **found}, trip)


async def prior_mean(model: Model, submit: Submit) -> tuple[Rows, Rows]:
    """E[x] and the standard deviation of E[x|z] under the prior, (c, h, w), for images of which nothing is seen.

    The model must have one size.
    """
    noise_shape = model.noise_at(*model.padded(None))
    trip = await drawn(model, submit, latent.standard_normal(0, PRIOR_DRAWS, noise_shape))
    return trip.arrays[0].mean(0), trip.arrays[0].std(0)


async def _fused(
    model: Model,
    submit: Submit,
    seen: Observation,
    mean: Rows,
    log_var: Rows,
    eps: Arrays = (),
    *,
    completions: bool = False,
) -> Trip:
    """The outputs of `fuse_rows` for that posterior, as the continuation of an answer that began with recognition."""
    program = model.plan(
        "fuse",
        fuse_rows,
        eps[0].shape[1] if eps else 0,
        seen.operator,
        local=seen.operator is None,
        images=(0, 2) if completions else (0,),
        completions=completions,
    )
    return await submit(program, (mean, log_var, *seen[:3], *eps), begun=True)


async def _refine(
    model: Model,
    submit: Submit,
    ascent: Ascent,
    seen: Observation,
    eps: Rows,
    observe: Observe | None,
    *,
    preview: bool,
) -> tuple[Any, ...]:
    """mean, log_var, bound and level of the refined posterior, and the time."""
    n, latent_dim = len(seen.y), ascent.q.shape[2] - seen.level.shape[1]
    unknown = np.zeros_like(seen.level)
    if seen.estimated is not None:
        unknown[:, seen.estimated] = 1.0
    operators = (np.broadcast_to(part, (n, *part.shape)) for part in seen.through())
    program = model.plan("refine", climb_rows, 0, "refinement", seen.y.shape[1:], RATE, rounds=STEPS)
    given = (seen.y, seen.mask, seen.level, unknown, *operators)

    async def watch(way: Waypoint) -> None:
        assert observe is not None
        shown = {}
        if preview:
            so_far = seen.with_level(way.told[1], LEAST_LEVEL, MOST_LEVEL)
            shown["images"] = (await _fused(model, submit, so_far, *way.ascent.posterior(latent_dim))).arrays[0]
        observe(way.result(shown))

    ascent, (bound, level), spent = await ascend(submit, program, ascent, eps, given, watch if observe else None)
    return *ascent.posterior(latent_dim), bound, level, spent
