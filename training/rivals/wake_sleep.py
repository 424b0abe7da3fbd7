"""Wake-sleep: each of the two networks learns from what the other makes.

Source: Hinton, Dayan, Frey and Neal (1995), "The wake-sleep algorithm for unsupervised neural networks".
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from training.elbo import Bound
from training.likelihoods.bernoulli import Bernoulli
from training.likelihoods.discretised_logistic import (
    LARGEST_LOG_SCALE,
    LEAST_LOG_SCALE,
    LEVELS,
    DiscretisedLogistic,
)
from training.likelihoods.gaussian import Gaussian
from training.model import VAE, Likelihood
from training.priors.learned import LearnedPrior
from training.priors.standard_normal import StandardNormal
from training.priors.vamp import Vamp

Dream = Literal["draw", "mean"]
"""What the sleep phase shows the recognition model: a draw of p(x|z), as the author's code does even where the data are
grey levels (dpkingma/anglepy, `gen_xz`), or E[x|z]."""


def wake_sleep(model: VAE, x: Tensor, eps: Tensor, generator: torch.Generator, dream: Dream = "draw") -> Bound:
    """The bound's value with wake-sleep's gradient, which is not that value's slope.

    Wake: log p(x, z) by the generative model's parameters alone, z ~ q(z|x). Sleep: log q(z|x) by the recognition
    model's alone, z ~ p(z), x ~ p(x|z), as many dreams as images. All of the gradient is log_likelihood's, none kl's,
    so that a trainer's free nats and warm-up of the KL leave it as it is.
    Shapes: x (n, c, h, w); eps (L, n, d), draws of N(0, I) for the wake phase; the answer's terms (n,).
    Raises: ValueError for a prior made of the recognition model, or of an unknown kind; likewise for likelihoods.
    """
    with torch.no_grad():
        posterior = model.posterior(x)
        z = posterior.draw(eps)
        kl = model.prior.kl(posterior, z)
    log_likelihood = model.likelihood.log_prob(model.decode(z), x).mean(0)
    asides = model.prior.log_prob(z).mean(0) + _sleep(model, eps, generator, dream)
    return Bound(log_likelihood + asides - asides.detach(), kl)


def draw_image(likelihood: Likelihood, parameters: Tensor, generator: torch.Generator) -> Tensor:
    """x ~ p(x|z), shaped like `parameters`; Gaussian pixels are clipped to [0, 1], as the author's code does.

    Raises: ValueError for a likelihood that it does not know.
    """
    mean = likelihood.mean(parameters)
    if isinstance(likelihood, Bernoulli):
        return torch.bernoulli(mean, generator=generator)
    if isinstance(likelihood, Gaussian):
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return (mean + likelihood.std() * noise).clamp(0.0, 1.0)
    if isinstance(likelihood, DiscretisedLogistic):
        noise = torch.logit(torch.rand(mean.shape, generator=generator, device=mean.device))
        scale = likelihood.log_scale.clamp(LEAST_LOG_SCALE, LARGEST_LOG_SCALE).exp()
        return (LEVELS * (mean + scale * noise)).floor().clamp(0, LEVELS - 1) / (LEVELS - 1)
    raise ValueError(f"no way to draw from {type(likelihood).__name__}; dream of its mean instead")


def _sleep(model: VAE, eps: Tensor, generator: torch.Generator, dream: Dream) -> Tensor:
    """log q(z|x) of one dream an image, (n,); nothing of it reaches the generative model."""
    with torch.no_grad():
        z = _draw_latent(model, eps, generator)
        parameters = model.decode(z)
        x = (
            model.likelihood.mean(parameters)
            if dream == "mean"
            else draw_image(model.likelihood, parameters, generator)
        )
    return model.posterior(x).log_prob(z)


def _draw_latent(model: VAE, eps: Tensor, generator: torch.Generator) -> Tensor:
    """z ~ p(z), (n, d)."""
    prior, (rows, dim) = model.prior, eps.shape[1:]
    if isinstance(prior, LearnedPrior) and not isinstance(prior, Vamp):
        return prior.draw(torch.randn(rows, prior.noise_dim, generator=generator, device=eps.device))
    if isinstance(prior, StandardNormal):
        return torch.randn(rows, dim, generator=generator, device=eps.device)
    raise ValueError(f"wake-sleep cannot train {type(prior).__name__}; take standard_normal or realnvp as prior")
