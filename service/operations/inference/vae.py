"""Encoding, decoding and sampling, composed of a model's graphs.

Each has two halves. A program is one trip through the batcher: arrays of rows in, arrays of rows out, no randomness.
Around it, a function draws the request's noise, submits the program, and names its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.operations.inference import latent
from service.operations.inference.latent import Noise
from service.runtime.program import Arrays, Compute, Graphs, Plan, Submit, Trip

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


def encode_rows(graphs: Graphs) -> Compute:
    """x -> mean, log_var."""
    return graphs["encoder"]


def decode_rows(graphs: Graphs) -> Compute:
    """z -> E[x|z]."""
    return graphs["decoder"]


def sample_rows(graphs: Graphs) -> Compute:
    """eps -> E[x|z], z, where z is drawn from the prior: eps itself where the prior is N(0, I)."""

    def compute(eps: Rows) -> Arrays:
        (z,) = graphs["prior"](eps) if "prior" in graphs else (eps,)
        return (*graphs["decoder"](z), z)

    return compute


def reconstruct_rows(graphs: Graphs) -> Compute:
    """x[, eps (n, L, *latent)] -> the decoder's mean, at the posterior's mean or averaged over L draws of it."""

    def compute(x: Rows, *eps: Rows) -> Arrays:
        mean, log_var = graphs["encoder"](x)
        if not eps:
            return graphs["decoder"](mean)
        return (decode_draws(graphs, latent.posterior_draws(mean, log_var, eps[0])).mean(1),)

    return compute


def decode_draws(graphs: Graphs, z: Rows) -> Rows:
    """(n, L, *latent) -> (n, L, c, h, w)."""
    (decoded,) = graphs["decoder"](z.reshape(-1, *z.shape[2:]))
    return decoded.reshape(*z.shape[:2], *decoded.shape[1:])


# Around a program: noise, submission, names.


async def encode(plan: Plan, submit: Submit, shape: tuple[int, ...], x: Rows, draws: int, noise: Noise) -> Result:
    """mean and log_var of q(z|x); with draws, latents (n, L, *latent) from it."""
    trip = await submit(plan("encode", encode_rows), (x,))
    mean, log_var = trip.arrays
    outputs = {"mean": mean, "log_var": log_var}
    if not draws:
        return Result(outputs, {}, trip)
    seed, eps = noise.normal(len(x), (draws, *shape))
    return Result({**outputs, "latents": latent.posterior_draws(mean, log_var, eps)}, {"seed": seed}, trip)


async def decode(plan: Plan, submit: Submit, z: Rows) -> Result:
    """E[x|z]."""
    trip = await submit(plan("decode", decode_rows, images=(0,), of_latents=True), (z,))
    return Result({"images": trip.arrays[0]}, {}, trip)


async def reconstruct(plan: Plan, submit: Submit, shape: tuple[int, ...], x: Rows, draws: int, noise: Noise) -> Result:
    """The decoder's mean at the posterior's mean, or averaged over draws."""
    eps, about = drawn_noise(noise, len(x), draws, shape)
    trip = await submit(plan("reconstruct", reconstruct_rows, draws, images=(0,)), (x, *eps))
    return Result({"images": trip.arrays[0]}, about, trip)


async def sample(
    plan: Plan, submit: Submit, shape: tuple[int, ...], count: int, temperature: float, latents: bool, noise: Noise
) -> Result:
    """Images from the prior: E[x|z] for z of the prior's noise, `shape` a row, scaled by the temperature."""
    seed, eps = noise.normal(count, shape)
    result = await transform(plan, submit, np.float32(temperature) * eps, latents=latents)
    return result._replace(about={"seed": seed})


async def transform(plan: Plan, submit: Submit, eps: Rows, *, latents: bool) -> Result:
    """The images, and on request the latents, that the prior makes of given noise."""
    trip = await submit(plan("sample", sample_rows, images=(0,), of_latents=True), (eps,))
    images, z = trip.arrays
    return _with_latents(images, z, trip, latents=latents)


async def interpolate(
    plan: Plan, submit: Submit, ends: Rows, steps: int, *, encoded: bool, spherical: bool, latents: bool
) -> Result:
    """E[x|z] at `steps` points of a path between two latents, or between the posterior means of two images."""
    z = ends if encoded else (await submit(plan("encode", encode_rows), (ends,))).arrays[0]
    between = latent.path(z[0], z[1], steps, spherical=spherical)
    trip = await submit(plan("decode", decode_rows, images=(0,), of_latents=True), (between,))
    return _with_latents(trip.arrays[0], between, trip, latents=latents)


def _with_latents(images: Rows, z: Rows, trip: Trip, *, latents: bool) -> Result:
    return Result({"images": images, **({"latents": z} if latents else {})}, {}, trip)


def drawn_noise(noise: Noise, rows: int, draws: int, shape: tuple[int, ...]) -> tuple[Arrays, dict[str, Any]]:
    """The request's eps (n, L, *latent) and its seed; nothing without draws."""
    if not draws:
        return (), {}
    seed, eps = noise.normal(rows, (draws, *shape))
    return (eps,), {"seed": seed}
