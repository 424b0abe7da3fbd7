"""The variational auto-encoder: q(z|x), p(z) and p(x|z), and the bound that they make."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.distributions.gaussian import DiagonalGaussian, of_rows
from training.distributions.interface import Likelihood, Prior


class Bound(NamedTuple):
    """The two terms of the evidence lower bound in nats per example, each (n,)."""

    log_likelihood: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        """log_likelihood - kl <= log p(x) in expectation, (n,); larger is better."""
        return self.log_likelihood - self.kl


class NoiseShapes(NamedTuple):
    """Shapes of the standard normal noise that one example takes."""

    posterior: tuple[int, ...]
    """For one draw of q(z|x)."""
    prior: tuple[int, ...]
    """For one draw of p(z)."""


class Inference(NamedTuple):
    """Draws of q(z|x) for n images, and what was computed on the way."""

    z: Tensor
    """(L, n, *latent_shape)."""
    q: DiagonalGaussian
    """The density of each number of z given those before it: mean and log_var, (n, d) or (L, n, d)."""
    parameters: Tensor
    """Of p(x|z), (L, n, c, h, w)."""


class VAE(nn.Module):
    """An encoder q(z|x), and a generative model p(z) p(x|z) of a decoder, a likelihood and a prior.

    What depends on the kind of posterior and on the shape of z is in this class: callers pass noise and get terms.
    Source: Kingma and Welling (2013), section 3.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: Likelihood, prior: Prior) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self.prior = prior

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one z."""
        return self.prior.event_shape

    @property
    def group_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes (c, h, w) of the groups of a hierarchical latent, from the top down; empty where z is one group."""
        return []

    @property
    def noise_shapes(self) -> NoiseShapes:
        """Shapes of the noise that `bound` and `sample` take for one example."""
        return NoiseShapes(self.latent_shape, self.prior.noise_shape)

    def noise(self, draws: int, rows: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise for draws of q(z|x), on the generator's device: (draws, rows, *latent_shape)."""
        shape = self.noise_shapes.posterior
        return torch.randn(draws, rows, *shape, generator=generator, device=generator.device)

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """q(z|x): x (n, c, h, w) -> mean and log_var (n, *latent_shape), in float32."""
        return of_rows(*self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Parameters of p(x|z): z (..., *latent_shape) -> (..., c, h, w), in float32."""
        axes = len(self.latent_shape)
        flat: Tensor = self.decoder(z.flatten(0, -axes - 1)).float()
        return flat.unflatten(0, z.shape[:-axes])

    def x_mean(self, z: Tensor) -> Tensor:
        """E[x|z]: z (..., *latent_shape) -> (..., c, h, w), in [0, 1]."""
        return self.likelihood.mean(self.decode(z))

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x|z] at the mean of q(z|x): (n, c, h, w) -> the same shape."""
        return self.x_mean(self.posterior(x).mean)

    def sample(self, eps: Tensor) -> Tensor:
        """E[x|z] at draws of the prior: eps (n, *noise_shapes.prior), draws of N(0, I) -> (n, c, h, w)."""
        return self.x_mean(self.prior.draw(eps))

    def infer(self, posterior: Any, eps: Tensor) -> Inference:
        """Draw z from a posterior and decode it.

        Args:
            posterior: What `posterior` returned for n images.
            eps: Draws of N(0, I), (L, n, *noise_shapes.posterior).
        """
        z = posterior.draw(eps)
        return Inference(z, posterior, self.decode(z))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x, z) in nats: x (n, c, h, w), z (..., n, *latent_shape) -> (..., n)."""
        return self.likelihood.log_prob(self.decode(z), x) + self.prior.log_prob(z)

    def bound(self, x: Tensor, eps: Tensor, posterior: Any = None) -> Bound:
        """Estimate the bound on log p(x), with the KL in closed form where it has one, differentiable in both networks.

        Args:
            x: (n, c, h, w).
            eps: Draws of N(0, I), (L, n, *noise_shapes.posterior).
            posterior: Instead of q(z|x), for example q(z | a corrupted x).

        Returns:
            The bound's terms, (n,) each.

        Source: Kingma and Welling (2013), equation 7 (estimator B) and equation 10.
        """
        z, q, parameters = self.infer(self.posterior(x) if posterior is None else posterior, eps)
        return Bound(self.likelihood.log_prob(parameters, x).mean(0), self.prior.kl(q, z))

    def log_weights(self, x: Tensor, eps: Tensor) -> Tensor:
        """Log p(x, z) / q(z|x) in nats at draws of q(z|x): eps (L, n, *noise_shapes.posterior) -> (L, n)."""
        z, q, parameters = self.infer(self.posterior(x), eps)
        return self.likelihood.log_prob(parameters, x) + self.prior.log_prob(z) - q.log_prob(z)
