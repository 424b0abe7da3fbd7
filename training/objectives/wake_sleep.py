"""Wake-sleep: each of the two networks learns from the output of the other.

Source: Hinton, Dayan, Frey and Neal (1995), "The wake-sleep algorithm for unsupervised neural networks".
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.models.vae import VAE, Bound


def wake_sleep(model: VAE, x: Tensor, eps: Tensor, generator: torch.Generator) -> Bound:
    """Return the bound's value with the gradient of wake-sleep, which is not the gradient of that value.

    The wake phase raises log p(x, z) by the generative model's parameters alone, z ~ q(z|x). The sleep phase raises
    log q(z|x) by the encoder's parameters alone, z ~ p(z) and x ~ p(x|z), one such pair an image. All of the gradient
    is in the term log_likelihood, none in kl, so free nats and a warm-up of the KL do not change it.

    Args:
        model: The VAE.
        x: (n, c, h, w).
        eps: Draws of N(0, I) for the wake phase, (L, n, *noise_shapes.posterior).
        generator: Draws of the sleep phase.

    Returns:
        The bound's terms, (n,) each.

    Raises:
        ValueError: The prior contains the encoder, so the two sets of parameters are not disjoint.
    """
    with torch.no_grad():
        posterior = model.posterior(x)
        z = posterior.draw(eps)
        kl = model.prior.kl(posterior, z)
    log_likelihood = model.likelihood.log_prob(model.decode(z), x).mean(0)
    asides = model.prior.log_prob(z).mean(0) + _sleep(model, len(x), generator)
    return Bound(log_likelihood + asides - asides.detach(), kl)


def _sleep(model: VAE, rows: int, generator: torch.Generator) -> Tensor:
    """Log q(z|x) of `rows` draws of p(x, z), (rows,), without a gradient in the generative model."""
    if model.prior.uses_encoder:
        name = type(model.prior).__name__
        raise ValueError(f"wake-sleep cannot train {name}; take standard_normal or realnvp as prior")
    with torch.no_grad():
        eps = torch.randn(rows, *model.noise_shapes.prior, generator=generator, device=generator.device)
        z = model.prior.draw(eps)
        x = model.likelihood.dream(model.decode(z), generator)
    return model.posterior(x).log_prob(z)
