"""The SGVB estimator of the evidence lower bound, and importance-sampled log p(x)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from training.gaussian import DiagonalGaussian
from training.model import VAE


class Bound(NamedTuple):
    """The two terms of the bound in nats per example, each (n,)."""

    log_likelihood: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        """log_likelihood - kl <= log p(x) in expectation; larger is better."""
        return self.log_likelihood - self.kl


def elbo(model: VAE, x: Tensor, eps: Tensor) -> Bound:
    """Estimate the bound on log p(x) with the closed-form KL, differentiable in both networks.

    Shapes: x (n, c, h, w); eps (L, n, d), draws of N(0, I); the answer's terms (n,).
    Source: Kingma and Welling (2013), equation 7 (estimator B) and equation 10.
    """
    return bound_under(model, model.posterior(x), x, eps)


def bound_under(model: VAE, posterior: DiagonalGaussian, x: Tensor, eps: Tensor) -> Bound:
    """The same bound under a posterior that somebody else supplies, such as q(z | a corrupted x)."""
    parameters = model.decode(posterior.draw(eps))
    return Bound(model.likelihood.log_prob(parameters, x).mean(0), model.prior.kl(posterior))


def importance_log_likelihood(model: VAE, x: Tensor, eps: Tensor) -> Tensor:
    """log (1/K) sum_k p(x, z_k) / q(z_k|x) in nats, z_k ~ q(z|x): a lower bound on log p(x), tight as K grows.

    Shapes: x (n, c, h, w), binary where the likelihood is Bernoulli; eps (K, n, d); the answer (n,).
    Source: Burda, Grosse and Salakhutdinov (2015), equation 8.
    """
    posterior = model.posterior(x)
    z = posterior.draw(eps)
    log_joint = model.likelihood.log_prob(model.decode(z), x) + model.prior.log_prob(z)
    return torch.logsumexp(log_joint - posterior.log_prob(z), 0) - math.log(len(eps))
