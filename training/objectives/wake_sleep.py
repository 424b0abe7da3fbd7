"""Wake-sleep: each of the two networks learns from what the other makes.

Source: Hinton, Dayan, Frey and Neal (1995), "The wake-sleep algorithm for unsupervised neural networks".
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.models.vae import VAE
from training.objectives.elbo import Bound


def wake_sleep(model: VAE, x: Tensor, eps: Tensor, generator: torch.Generator) -> Bound:
    """The bound's value with wake-sleep's gradient, which is not that value's slope.

    Wake: log p(x, z) by the generative model's parameters alone, z ~ q(z|x). Sleep: log q(z|x) by the recognition
    model's alone, z ~ p(z), x a dream of p(x|z), as many as images. All of the gradient is log_likelihood's, none kl's,
    so that a trainer's free nats and warm-up of the KL leave it as it is.
    Shapes: x (n, c, h, w); eps (L, n, d), draws of N(0, I) for the wake phase; the answer's terms (n,).
    Raises: ValueError for a prior made of the recognition model.
    """
    with torch.no_grad():
        posterior = model.posterior(x)
        z = posterior.draw(eps)
        kl = model.prior.kl(posterior, z)
    log_likelihood = model.likelihood.log_prob(model.decode(z), x).mean(0)
    asides = model.prior.log_prob(z).mean(0) + _sleep(model, eps, generator)
    return Bound(log_likelihood + asides - asides.detach(), kl)


def _sleep(model: VAE, eps: Tensor, generator: torch.Generator) -> Tensor:
    """log q(z|x) of one dream an image, (n,); nothing of it reaches the generative model."""
    prior, (rows, dim) = model.prior, eps.shape[1:]
    if prior.of_recognition:
        raise ValueError(f"wake-sleep cannot train {type(prior).__name__}; take standard_normal or realnvp as prior")
    with torch.no_grad():
        z = prior.draw(torch.randn(rows, prior.noise_dim or dim, generator=generator, device=eps.device))
        x = model.likelihood.dream(model.decode(z), generator)
    return model.posterior(x).log_prob(z)
