"""Scores of images under the model: ELBO and importance-weighted log p(x), over draws of q(z|x).

Draws are cut into slices. Sums over them are taken here, in double precision.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.operations.inference.latent import LOG_2_PI, Noise, uniform
from service.operations.inference.refinement import (
    NEARBY_RATE,
    REFINEMENT_STREAM,
    STEPS,
    Waypoint,
    ascend,
    begin,
    climb_rows,
)
from service.operations.inference.vae import Observe, Result, Rows, decoded, draw_rows, posterior
from service.runtime.model import Model
from service.runtime.program import Arrays, Compute, Graphs, Submit, Trip

DRAWS = 16
"""Default draws for each image; the percentiles in the manifest use as many."""
SLICE = 64
"""Draws in one slice. A request of more images times draws is iterative work."""
BINARISATION_STREAM = 2
"""Stream of a request's noise for its pixels."""

Doubles = NDArray[np.float64]
Posterior = tuple[Rows, ...]
"""mean and log_var of a Gaussian q, each (n, *latent); empty for a posterior that needs noise."""


def weigh_rows(graphs: Graphs) -> Compute:
    """x, eps (n, L, *latent)[, mean, log_var] -> log p(x|z), log p(z) and log q(z|x), (n, L), at draws z of q."""
    draw = draw_rows(graphs)

    def compute(x: Rows, eps: Rows, *q: Rows) -> Arrays:
        z, log_q = draw(x, eps, *q)
        joint = graphs["log_joint"](np.repeat(x, eps.shape[1], axis=0), z.reshape(-1, *z.shape[2:]))
        return (*(part.reshape(eps.shape[:2]) for part in joint), log_q)

    return compute


class Terms(NamedTuple):
    """log p(x|z), log p(z) and log q(z) at draws z of q, (n, L), and the entropy of q, (n,), all in nats.

    The entropy of a posterior that needs noise is the mean of -log q(z) over the draws.
    """

    log_likelihood: Doubles
    log_prior: Doubles
    log_q: Doubles
    entropy: Doubles

    def bound(self) -> tuple[Doubles, Doubles]:
        """E_q log p(x|z) and KL(q || p(z)), (n,): the entropy in closed form, the rest means over the draws.

        Source:
            Kingma and Welling (2013), equation 6.
        """
        return self.log_likelihood.mean(1), -self.entropy - self.log_prior.mean(1)

    def weighted(self) -> tuple[Doubles, Doubles]:
        """log of the mean weight p(x, z) / q(z), and, by the delta method, its standard error, (n,).

        Source:
            Burda, Grosse and Salakhutdinov (2015), equation 8.
        """
        log_weights = self.log_likelihood + self.log_prior - self.log_q
        largest = log_weights.max(1)
        weights = np.exp(log_weights - largest[:, None])
        mean, draws = weights.mean(1), weights.shape[1]
        spread = np.square(weights - mean[:, None]).sum(1) / max(1, draws - 1)
        return largest + np.log(mean), np.sqrt(spread / draws) / mean


class ScoreChoices(NamedTuple):
    """How to score, and what to return: see `ScoreOptions`.

    Args:
        binarisation: `sample`, `threshold` or `none`.
        weighted: Whether the images have a probability, so that importance weights exist.
        refined: Whether q is refined for each image.
        draws: Draws for each image.
        error: Whether the answer holds the squared error.
    """

    binarisation: str
    weighted: bool
    refined: bool
    draws: int
    error: bool


async def score(
    model: Model, submit: Submit, x: Rows, choices: ScoreChoices, noise: Noise, observe: Observe | None = None
) -> Result:
    """Scores of images.

    Args:
        model: The model.
        submit: Submits a program.
        x: Images, (n, c, h, w).
        choices: How to score.
        noise: The request's noise.
        observe: Called after every window of a refinement.

    Returns:
        Figures, (n,) in nats, and on request the squared error, (n, c, h, w).
    """
    seed, noise = noise.settled()
    x = binarised(x, choices.binarisation, noise)
    trip = await posterior(model, submit, x) if "encoder" in model.graphs else Trip((), 0.0, 0.0)
    q: Posterior = trip.arrays
    _, eps = noise.normal(len(x), (choices.draws, *model.latent_at(*x.shape[-2:])))
    terms, trip = await _terms(model, submit, x, q, eps, trip)
    log_likelihood, kl = terms.bound()
    figures = {"elbo": log_likelihood - kl, "log_likelihood": log_likelihood, "kl": kl}
    if choices.refined:
        q, trip = await _refined(model, submit, x, q, noise, trip, observe)
        terms, trip = await _terms(model, submit, x, q, eps, trip)
        log_likelihood, kl = terms.bound()
        figures["refined_elbo"] = log_likelihood - kl
    if choices.weighted:
        figures["importance_weighted"], error = terms.weighted()
        if choices.draws > 1:
            figures["standard_error"] = error
    outputs = {name: figure.astype(np.float32) for name, figure in figures.items()}
    if choices.error:
        if not q:
            trip = (await posterior(model, submit, x)).after(trip)
        mean = q[0] if q else trip.arrays[0]
        trip = (await decoded(model, submit, mean)).after(trip)
        outputs["error"] = np.square(trip.arrays[0] - x)
    return Result(outputs, {"seed": seed, "binarisation": choices.binarisation}, trip)


def binarised(x: Rows, how: str, noise: Noise) -> Rows:
    """x in black and white: pixels drawn with grey levels as probabilities, or cut at 0.5; x itself for `none`."""
    if how == "none":
        return x
    seed, _ = noise.settled()
    cut = uniform(seed, len(x), x.shape[1:], noise.first, BINARISATION_STREAM) if how == "sample" else np.float32(0.5)
    return (x > cut if how == "sample" else x >= cut).astype(np.float32)


async def _terms(model: Model, submit: Submit, x: Rows, q: Posterior, eps: Rows, before: Trip) -> tuple[Terms, Trip]:
    """The terms at the draws of noise eps (n, L, *latent), and the time with that of `before`."""
    n, draws = eps.shape[:2]
    slices = range(0, draws, SLICE)
    rounds = 1 if n * draws <= SLICE else max(2, len(slices))
    joint = []
    for start in slices:
        part = np.ascontiguousarray(eps[:, start : start + SLICE])
        further: dict[str, Any] = {"begun": True} if start else {}
        program = model.plan("weigh", weigh_rows, part.shape[1], rounds=rounds, local=False)
        trip = await submit(program, (x, part, *q), **further)
        joint.append(trip.arrays)
        before = trip.after(before)
    log_likelihood, log_prior, log_q = (
        np.concatenate(parts, 1, dtype=np.float64) for parts in zip(*joint, strict=True)
    )
    entropy = 0.5 * (q[1].reshape(n, -1).astype(np.float64) + 1.0 + LOG_2_PI).sum(1) if q else -log_q.mean(1)
    return Terms(log_likelihood, log_prior, log_q, entropy), before


async def _refined(
    model: Model, submit: Submit, x: Rows, q: Posterior, noise: Noise, before: Trip, observe: Observe | None
) -> tuple[Posterior, Trip]:
    """q refined for each image from q(z|x) on, and the time with that of `before`."""
    _, eps = noise.normal(len(x), (STEPS, *q[0].shape[1:]), REFINEMENT_STREAM)
    program = model.plan("climb", climb_rows, 0, "elbo_gradient", x.shape[1:], NEARBY_RATE, rounds=STEPS)

    async def watch(way: Waypoint) -> None:
        assert observe is not None
        observe(way.result({}))

    mean, log_var = q
    ascent, _, spent = await ascend(submit, program, begin(mean, log_var, 0), eps, (x,), watch if observe else None)
    return ascent.posterior(eps.shape[2]), spent.after(before)
