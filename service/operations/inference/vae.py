"""Encoding, decoding and sampling, composed of a model's graphs.

Each has two halves. A program is one trip through the batcher: arrays of rows in, arrays of rows out, no randomness.
Around it, a function draws the request's noise, submits the program, and names its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.contract.graphs import Axis, at_size
from service.operations.inference import latent
from service.operations.inference.latent import Noise
from service.runtime.model import Model
from service.runtime.program import Arrays, Compute, Graphs, Submit, Trip

Rows = NDArray[np.float32]


class Result(NamedTuple):
    """The result of an operation.

    Args:
        outputs: Arrays by name, one row for each row of the request.
        about: Further fields of the answer.
        trip: Time in the queue and in the model.
    """

    outputs: dict[str, Rows]
    about: dict[str, Any]
    trip: Trip


def noted(result: Result, code: str, rows: Iterable[int], detail: str) -> Result:
    """The result with one more note about some of its rows.

    Args:
        result: The result of an operation.
        code: Stable code that clients may branch on.
        rows: Indices of the rows in the request.
        detail: A sentence for people, in ASCII.
    """
    notes = [*result.about.get("notes", ()), {"code": code, "rows": [int(row) for row in rows], "detail": detail}]
    return result._replace(about={**result.about, "notes": notes})


Observe = Callable[[Result], None]
"""Called with the progress of iterative work: `about` has the step, the outputs, if any, are the estimates so far."""


# Programs: (graphs, static choices...) -> a function from arrays of rows to arrays of rows.


def encode_rows(graphs: Graphs, latent_axes: tuple[Axis, ...]) -> Compute:
    """x -> mean, log_var of q(z|x); of a posterior that needs noise, those at noise 0.

    Args:
        graphs: The graphs.
        latent_axes: Shape of a latent as the manifest has it.
    """
    if "encoder" in graphs:
        return graphs["encoder"]

    def compute(x: Rows) -> Arrays:
        eps = np.zeros((len(x), *at_size(latent_axes, *x.shape[-2:])), np.float32)
        _, mean, log_var, _ = graphs["posterior"](x, eps)
        return mean, log_var

    return compute


def draw_rows(graphs: Graphs) -> Compute:
    """x, eps (n, L, *latent)[, mean, log_var of q(z|x)] -> draws z (n, L, *latent) of q(z|x), log q(z|x) (n, L)."""

    def compute(x: Rows, eps: Rows, *q: Rows) -> Arrays:
        if "posterior" in graphs:
            given = np.repeat(x, eps.shape[1], axis=0), eps.reshape(-1, *eps.shape[2:])
            z, _, _, log_q = graphs["posterior"](*given)
            return z.reshape(eps.shape), log_q.reshape(eps.shape[:2])
        mean, log_var = q or graphs["encoder"](x)
        return latent.posterior_draws(mean, log_var, eps), latent.log_density(log_var, eps)

    return compute


def decode_rows(graphs: Graphs) -> Compute:
    """z -> E[x|z]."""
    return graphs["decoder"]


def sample_rows(graphs: Graphs) -> Compute:
    """eps -> E[x|z], z, where z is drawn from the prior: eps itself where the prior is N(0, I)."""

    def compute(eps: Rows) -> Arrays:
        (z,) = graphs["prior"](eps) if "prior" in graphs else (eps,)
        return (*graphs["decoder"](z), z)

    return compute


def reconstruct_rows(graphs: Graphs, latent_axes: tuple[Axis, ...]) -> Compute:
    """x[, eps (n, L, *latent)] -> the decoder's mean, at the posterior's mean or averaged over L draws of it."""
    encode, draw = encode_rows(graphs, latent_axes), draw_rows(graphs)

    def compute(x: Rows, *eps: Rows) -> Arrays:
        if not eps:
            return graphs["decoder"](encode(x)[0])
        return (decode_draws(graphs, draw(x, eps[0])[0]).mean(1),)

    return compute


def decode_draws(graphs: Graphs, z: Rows) -> Rows:
    """(n, L, *latent) -> (n, L, c, h, w)."""
    (decoded,) = graphs["decoder"](z.reshape(-1, *z.shape[2:]))
    return decoded.reshape(*z.shape[:2], *decoded.shape[1:])


# Around a program: noise, submission, names.


async def encode(model: Model, submit: Submit, x: Rows, draws: int, noise: Noise) -> Result:
    """mean and log_var of q(z|x); with draws, latents (n, L, *latent) from it."""
    trip = await posterior(model, submit, x)
    mean, log_var = trip.arrays
    outputs = {"mean": mean, "log_var": log_var}
    if not draws:
        return Result(outputs, {}, trip)
    (eps,), about = drawn_noise(noise, len(x), draws, mean.shape[1:])
    if "encoder" in model.graphs:
        outputs["latents"] = latent.posterior_draws(mean, log_var, eps)
    else:
        trip = (await submit(model.plan("draw", draw_rows, draws), (x, eps), begun=True)).after(trip)
        outputs["latents"] = trip.arrays[0]
    return Result(outputs, about, trip)


async def posterior(model: Model, submit: Submit, x: Rows) -> Trip:
    """mean and log_var of q(z|x); of a posterior that needs noise, those at noise 0."""
    return await submit(model.plan("encode", encode_rows, 0, model.latent_axes), (x,))


async def decode(model: Model, submit: Submit, z: Rows) -> Result:
    """E[x|z]."""
    trip = await decoded(model, submit, z)
    return Result({"images": trip.arrays[0]}, {}, trip)


async def decoded(model: Model, submit: Submit, z: Rows) -> Trip:
    """E[x|z]."""
    return await submit(model.plan("decode", decode_rows, images=(0,), block=model.manifest.latent_block), (z,))


async def reconstruct(model: Model, submit: Submit, x: Rows, draws: int, noise: Noise) -> Result:
    """The decoder's mean at the posterior's mean, or averaged over draws."""
    eps, about = drawn_noise(noise, len(x), draws, model.latent_at(*x.shape[-2:]) if draws else ())
    trip = await submit(model.plan("reconstruct", reconstruct_rows, draws, model.latent_axes, images=(0,)), (x, *eps))
    return Result({"images": trip.arrays[0]}, about, trip)


async def sample(
    model: Model, submit: Submit, shape: tuple[int, ...], count: int, temperature: float, latents: bool, noise: Noise
) -> Result:
    """Images from the prior: E[x|z] for z of the prior's noise, `shape` a row, scaled by the temperature."""
    seed, eps = noise.normal(count, shape)
    result = await transform(model, submit, np.float32(temperature) * eps, latents=latents)
    return result._replace(about={"seed": seed})


async def transform(model: Model, submit: Submit, eps: Rows, *, latents: bool) -> Result:
    """The images, and on request the latents, that the prior makes of given noise."""
    images, z = (trip := await drawn(model, submit, eps)).arrays
    return _with_latents(images, z, trip, latents=latents)


async def drawn(model: Model, submit: Submit, eps: Rows) -> Trip:
    """E[x|z] and z, which the prior makes of given noise."""
    return await submit(model.plan("sample", sample_rows, images=(0,), block=model.manifest.latent_block), (eps,))


async def interpolate(
    model: Model, submit: Submit, ends: Rows, steps: int, *, encoded: bool, spherical: bool, latents: bool
) -> Result:
    """E[x|z] at `steps` points of a path between two latents, or between the posterior means of two images."""
    z = ends if encoded else (await posterior(model, submit, ends)).arrays[0]
    between = latent.path(z[0], z[1], steps, spherical=spherical)
    trip = await decoded(model, submit, between)
    return _with_latents(trip.arrays[0], between, trip, latents=latents)


def _with_latents(images: Rows, z: Rows, trip: Trip, *, latents: bool) -> Result:
    return Result({"images": images, **({"latents": z} if latents else {})}, {}, trip)


def drawn_noise(noise: Noise, rows: int, draws: int, shape: tuple[int, ...]) -> tuple[Arrays, dict[str, Any]]:
    """The request's eps (n, L, *latent) and its seed; nothing without draws."""
    if not draws:
        return (), {}
    seed, eps = noise.normal(rows, (draws, *shape))
    return (eps,), {"seed": seed}
