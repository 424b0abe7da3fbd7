"""Other estimators than `VAE.bound`: Monte Carlo KL, the importance-weighted bound, importance-sampled log p(x)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.models.vae import VAE, Bound

Objective = Callable[[Any, Tensor, torch.Generator], Bound]
"""(module, uint8 minibatch (n, c, h, w), this step's random numbers) -> the bound's two terms, (n,) each."""


def monte_carlo_elbo(model: VAE, x: Tensor, eps: Tensor) -> Bound:
    """Estimate the bound with the KL as a mean over the draws: unbiased, and noisier than a KL in closed form.

    Args:
        model: The VAE.
        x: (n, c, h, w).
        eps: Draws of N(0, I), (L, n, *noise_shapes.posterior).

    Returns:
        The bound's terms, (n,) each.

    Source: Kingma and Welling (2013), equation 6 (estimator A).
    """
    z, q, parameters = model.infer(model.posterior(x), eps)
    kl = q.log_prob(z) - model.prior.log_prob(z)
    return Bound(model.likelihood.log_prob(parameters, x).mean(0), kl.mean(0))


def importance_weighted(model: VAE, x: Tensor, eps: Tensor) -> Bound:
    """Estimate the importance-weighted bound with K draws and doubly reparameterised gradients.

    The value is that of `importance_log_likelihood`, all of it in the term log_likelihood. The encoder's gradient
    uses the squared weights, so its signal does not vanish as K grows.

    Args:
        model: The VAE.
        x: (n, c, h, w).
        eps: Draws of N(0, I), (K, n, *noise_shapes.posterior).

    Returns:
        The bound's terms, (n,) each.

    Source: Burda, Grosse and Salakhutdinov (2015), equation 8; Tucker et al. (2019), equation 9.
    """
    posterior = model.posterior(x)
    z = posterior.draw(eps)
    log_weights = model.log_joint(x, z) - posterior.detach().log_prob(z)
    weights = torch.softmax(log_weights.detach(), 0)
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * weights[(..., *[None] * len(model.latent_shape))])
    surrogate = (weights * log_weights).sum(0)
    value = torch.logsumexp(log_weights.detach(), 0) - math.log(len(eps))
    return Bound(value + surrogate - surrogate.detach(), torch.zeros_like(value))


def importance_log_likelihood(model: VAE, x: Tensor, eps: Tensor) -> Tensor:
    """Estimate log p(x) by log (1/K) sum_k p(x, z_k) / q(z_k|x), z_k ~ q(z|x): a lower bound, tight as K grows.

    Args:
        model: The VAE.
        x: (n, c, h, w).
        eps: Draws of N(0, I), (K, n, *noise_shapes.posterior).

    Returns:
        Nats, (n,).

    Raises:
        ValueError: The likelihood gives x no probability, as Bernoulli pixels give none to grey levels.

    Source: Burda, Grosse and Salakhutdinov (2015), equation 8.
    """
    model.likelihood.check(x)
    return torch.logsumexp(model.log_weights(x, eps), 0) - math.log(len(eps))
