"""The variational auto-encoder: q(z|x), p(z) and p(x|z) as separate, named things."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from training.distributions.gaussian import DiagonalGaussian


class Likelihood(Protocol):
    """p(x|z), given what the decoder puts out; a module, since it may have parameters of its own."""

    binary: bool
    """Whether only images of 0 and 1 have a probability."""
    eight_bit: bool
    """Whether it gives every grey level a probability, so that bits per dimension mean something."""

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """log p(x|z) in nats: (..., c, h, w) -> (...)."""

    def mean(self, parameters: Tensor) -> Tensor:
        """E[x|z], shaped like x."""

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """x ~ p(x|z), shaped like `parameters`, in [0, 1]."""

    def dream(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """The draw that wake-sleep's recognition model learns from."""


class Prior(Protocol):
    """p(z); a module, since it may have parameters."""

    of_recognition: bool
    """Whether it is made of the recognition model."""

    @property
    def noise_dim(self) -> int | None:
        """Width of the standard normal noise that `draw` takes; None where it is z's own."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats: (..., d) -> (...)."""

    def kl(self, posterior: DiagonalGaussian, z: Tensor) -> Tensor:
        """KL(posterior || prior) in nats, exact or estimated at the posterior's draws z (L, n, d): (n, d) -> (n,)."""

    def draw(self, eps: Tensor) -> Tensor:
        """z ~ p(z) for eps ~ N(0, I): (n, noise_dim) -> (n, d)."""


class VAE(nn.Module):
    """A recognition model q(z|x), a generative model p(z) p(x|z).

    Source: Kingma and Welling (2013), section 3.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: Likelihood, prior: Prior) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self.prior = prior

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """q(z|x): x (n, c, h, w) -> mean and log_var (n, d), in float32."""
        mean, log_var = self.encoder(x)
        return DiagonalGaussian(mean.float(), log_var.float())

    def decode(self, z: Tensor) -> Tensor:
        """Parameters of p(x|z): z (..., d) -> (..., c, h, w), in float32."""
        flat: Tensor = self.decoder(z.flatten(0, -2)).float()
        return flat.unflatten(0, z.shape[:-1])
