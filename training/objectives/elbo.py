"""The SGVB estimator of the evidence lower bound, and importance-sampled log p(x)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from training.distributions.gaussian import DiagonalGaussian
from training.models.vae import VAE


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
    z = posterior.draw(eps)
    return Bound(model.likelihood.log_prob(model.decode(z), x).mean(0), model.prior.kl(posterior, z))


def denoising_elbo(model: VAE, x: Tensor, corrupted: Tensor, eps: Tensor) -> Bound:
    """The bound on log p(x) with the posterior of a corrupted x: the recognition model learns to see through noise.

    Shapes: x and corrupted (n, c, h, w); eps (L, n, d).
    Source: Im et al. (2015), "Denoising criterion for variational auto-encoding framework", equation 5.
    """
    return bound_under(model, model.posterior(corrupted), x, eps)


def monte_carlo_elbo(model: VAE, x: Tensor, eps: Tensor) -> Bound:
    """The same bound with the KL estimated at the draws: unbiased, and where the KL has a closed form, noisier.

    Shapes as of `elbo`. Source: Kingma and Welling (2013), equation 6 (estimator A).
    """
    posterior = model.posterior(x)
    z = posterior.draw(eps)
    kl = posterior.log_prob(z) - model.prior.log_prob(z)
    return Bound(model.likelihood.log_prob(model.decode(z), x).mean(0), kl.mean(0))


def importance_weighted(model: VAE, x: Tensor, eps: Tensor) -> Bound:
    """The importance-weighted bound with K draws, whose gradients are doubly reparameterised.

    Its value is `importance_log_likelihood`, not split into two terms. The recognition model's gradient is that of the
    squared weights, whose signal does not vanish as K grows.
    Shapes: x (n, c, h, w); eps (K, n, d).
    Source: Burda, Grosse and Salakhutdinov (2015), equation 8; Tucker et al. (2019), equation 9.
    """
    posterior = model.posterior(x)
    z = posterior.draw(eps)
    fixed = DiagonalGaussian(posterior.mean.detach(), posterior.log_var.detach())
    log_weights = model.likelihood.log_prob(model.decode(z), x) + model.prior.log_prob(z) - fixed.log_prob(z)
    weights = torch.softmax(log_weights.detach(), 0)
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * weights.unsqueeze(-1))
    surrogate = (weights * log_weights).sum(0)
    value = torch.logsumexp(log_weights.detach(), 0) - math.log(len(eps))
    return Bound(value + surrogate - surrogate.detach(), torch.zeros_like(value))


def importance_log_likelihood(model: VAE, x: Tensor, eps: Tensor) -> Tensor:
    """log (1/K) sum_k p(x, z_k) / q(z_k|x) in nats, z_k ~ q(z|x): a lower bound on log p(x), tight as K grows.

    Shapes: x (n, c, h, w); eps (K, n, d); the answer (n,).
    Raises: ValueError for grey levels under a Bernoulli likelihood: they have no probability, so this would be none.
    Source: Burda, Grosse and Salakhutdinov (2015), equation 8.
    """
    if model.likelihood.binary and not bool(((x == 0) | (x == 1)).all()):
        raise ValueError("grey levels have no probability under Bernoulli pixels; binarise the images first")
    posterior = model.posterior(x)
    z = posterior.draw(eps)
    log_joint = model.likelihood.log_prob(model.decode(z), x) + model.prior.log_prob(z)
    return torch.logsumexp(log_joint - posterior.log_prob(z), 0) - math.log(len(eps))
