"""Fully connected encoder and decoder: the paper's networks, with any number of hidden layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from training.networks.network import Network
from training.strict import Widths

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "softplus": nn.Softplus, "silu": nn.SiLU}


class Mlp(Network):
    """Hidden layers of the given widths in the encoder, and of the reversed widths in the decoder.

    Source: Kingma and Welling (2013), appendix C.
    """

    architecture: Literal["mlp"]
    """Fully connected layers."""
    hidden: Widths = (500,)
    """Widths of the encoder's hidden layers, first one first."""
    activation: Literal["tanh", "relu", "softplus", "silu"] = "tanh"
    """Activation of the hidden layers."""

    def encoder(self, shape: tuple[int, int, int], latent_dim: int) -> nn.Module:
        """x (n, *shape) -> mean, log_var (n, latent_dim)."""
        body = self._layers((math.prod(shape), *self.hidden))
        return MlpEncoder(nn.Sequential(nn.Flatten(), *body), self.hidden[-1], latent_dim)

    def decoder(self, latent_dim: int, shape: tuple[int, int, int]) -> nn.Module:
        """z (n, latent_dim) -> parameters of p(x|z) (n, *shape)."""
        body = self._layers((latent_dim, *reversed(self.hidden)))
        return nn.Sequential(*body, nn.Linear(self.hidden[0], math.prod(shape)), nn.Unflatten(1, shape))

    def _layers(self, widths: tuple[int, ...]) -> list[nn.Module]:
        activation = ACTIVATIONS[self.activation]
        return [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), activation())]


class MlpEncoder(nn.Module):
    """A body with linear heads for mean and log_var; log_var starts at 0, so q(z|x) starts with unit variance.

    `head` makes a head of the features' width and the latents'.
    """

    def __init__(
        self, body: nn.Module, width: int, latent_dim: int, head: Callable[[int, int], nn.Module] = nn.Linear
    ) -> None:
        super().__init__()
        self.body = body
        self.mean = head(width, latent_dim)
        self.log_var = head(width, latent_dim)
        for parameter in self.log_var.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, c, h, w) -> mean, log_var (n, *latent_shape)."""
        features = self.body(x)
        return self.mean(features), self.log_var(features)
