"""Estimates of log p(x) from draws of the posterior alone; they use no encoder, so they compare training methods.

Accurate in few dimensions only: below five, according to the source.
Source: Kingma and Welling (2013), appendix D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from training.distributions.gaussian import LOG_2_PI
from training.inference import hmc
from training.models.vae import VAE

MULTIPLES = [math.exp(i / 2) for i in range(-5, 5)]
"""Candidate bandwidths as multiples of Scott's."""


class FittedDensity(Protocol):
    """A normalised density of z for each of n images."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log q(z) in nats: (L, n, d) -> (L, n)."""


class Gaussian(NamedTuple):
    """N(mean, factor factor^T): mean (n, d), factor (n, d, d) lower triangular."""

    mean: Tensor
    factor: Tensor

    def whiten(self, z: Tensor) -> Tensor:
        """Transform z (L, n, d) to coordinates in which this is N(0, I): (n, L, d)."""
        centred = (z.double() - self.mean).permute(1, 2, 0)
        return torch.linalg.solve_triangular(self.factor, centred, upper=False).mT

    def log_volume(self) -> Tensor:
        """Log volume of the unit cube of those coordinates, (n,)."""
        return self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log q(z) in nats: (L, n, d) -> (L, n)."""
        return -0.5 * (self.whiten(z).square() + LOG_2_PI).sum(-1).T - self.log_volume()


class KernelDensity(NamedTuple):
    """The mean of Gaussians at `centres` (k, n, d) with the covariance of `scale` times `bandwidth`^2 (n,)."""

    centres: Tensor
    scale: Gaussian
    bandwidth: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """Log q(z) in nats: (L, n, d) -> (L, n)."""
        dim, width = z.shape[-1], self.bandwidth[:, None, None]
        distance = torch.cdist(self.scale.whiten(z), self.scale.whiten(self.centres)) / width
        log_kernel = -0.5 * (distance.square() + dim * LOG_2_PI) - dim * width.log()
        return torch.logsumexp(log_kernel, -1).T - math.log(len(self.centres)) - self.scale.log_volume()


def fit_gaussian(z: Tensor) -> Gaussian:
    """Fit the Gaussian with the draws' mean and covariance: z (L, n, d), L > d.

    A millionth of the mean variance is added to the diagonal, so that a chain that never moved has a density too.
    """
    z = z.double()
    mean, dim = z.mean(0), z.shape[-1]
    centred = (z - mean).transpose(0, 1)
    covariance = centred.mT @ centred / (len(z) - 1)
    ridge = 1e-6 * covariance.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12
    floor = ridge[:, None, None] * torch.eye(dim, dtype=z.dtype, device=z.device)
    return Gaussian(mean, torch.linalg.cholesky(covariance + floor))


def fit_kernel_density(z: Tensor) -> KernelDensity:
    """Fit kernels at every draw, shaped by the draws' covariance: z (L, n, d), L > d.

    The bandwidth is the one for which kernels at the first half of the draws give the second half the highest density.
    Source: the first author's code (dpkingma/anglepy, hmc_est.py, `kde_infer_factor`); Scott (1992), for the scale.
    """
    scale, (kernels, held_out) = fit_gaussian(z), (z[: len(z) // 2], z[len(z) // 2 :])
    candidates = torch.tensor(MULTIPLES, dtype=torch.float64, device=z.device)
    scores = torch.stack(
        [KernelDensity(kernels, scale, _scott(kernels) * each).log_prob(held_out).sum(0) for each in candidates]
    )
    return KernelDensity(z, scale, _scott(z) * candidates[scores.argmax(0)])


def reciprocal_mean(density: FittedDensity, z: Tensor, log_joint: Tensor) -> Tensor:
    """Estimate log p(x) from 1 / p(x) = E[q(z) / p(x, z)] over draws z ~ p(z|x) to which q was not fitted.

    Args:
        density: q.
        z: (L, n, d).
        log_joint: Log p(x, z) in nats, (L, n).

    Returns:
        Nats, (n,).
    """
    return math.log(len(z)) - torch.logsumexp(density.log_prob(z) - log_joint.double(), 0)


def reciprocal_log_likelihood(
    model: VAE,
    x: Tensor,
    start: Tensor,
    generator: torch.Generator,
    *,
    draws: int = 50,
    fit: Callable[[Tensor], FittedDensity] = fit_kernel_density,
    leapfrog_steps: int = 4,
    burn_in: int = 100,
) -> Tensor:
    """Estimate log p(x) by Hybrid Monte Carlo: half of the draws fit q, the other half estimate.

    The mean is of 1 / p(x), so in expectation the estimate is too high, more so with fewer draws. The defaults are
    those of the source's figure 3, but for the burn-in, which it does not state (its code: 5).

    Args:
        model: The VAE; its encoder is not used.
        x: (n, c, h, w).
        start: Where the chains begin, (n, d).
        generator: Of the chains.
        draws: Of each chain.
        fit: Fits q to draws (L, n, d).
        leapfrog_steps: Of each transition.
        burn_in: Transitions before the first draw.

    Returns:
        Nats, (n,).

    Raises:
        ValueError: The likelihood gives x no probability, or there are too few draws.

    Source: Kingma and Welling (2013), appendix D.
    """
    model.likelihood.check(x)
    half = draws // 2
    if half <= start.shape[1]:
        raise ValueError(f"{draws} draws are too few in {start.shape[1]} dimensions; half must exceed the dimensions")
    chain = hmc.sample(
        partial(model.log_joint, x), start, draws, generator, leapfrog_steps=leapfrog_steps, burn_in=burn_in
    )
    return reciprocal_mean(fit(chain.z[:half]), chain.z[half:], chain.log_density[half:])


def _scott(z: Tensor) -> Tensor:
    """Scott's bandwidth in units of the draws' standard deviation, (n,)."""
    size = len(z) ** (-1.0 / (z.shape[-1] + 4))
    return torch.full((z.shape[1],), size, dtype=torch.float64, device=z.device)
