"""A model whose log p(x) and posterior are known exactly: the outside oracle of the estimators' tests."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from training.distributions.interface import Likelihood
from training.distributions.priors.standard_normal import StandardNormal
from training.models.vae import VAE


class FixedGaussian(Likelihood):
    """p(x|z) = N(parameters, variance), the same variance for every pixel."""

    def __init__(self, shape: tuple[int, int, int], variance: float) -> None:
        super().__init__(shape)
        self.variance = variance

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """log p(x|z) in nats: (..., c, h, w) -> (...)."""
        square = (x - parameters).square() / self.variance
        return -0.5 * (square + math.log(2.0 * math.pi * self.variance)).flatten(-3).sum(-1)

    def mean(self, parameters: Tensor) -> Tensor:
        """E[x|z]."""
        return parameters


class LinearEncoder(nn.Module):
    """q(z|x) = N(A x + a, diag(exp(log_var))), log_var the same for every x."""

    def __init__(self, weight: Tensor, bias: Tensor, log_var: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.log_var = (nn.Parameter(t.float()) for t in (weight, bias, log_var))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, c, h, w) -> (n, d), (n, d)."""
        mean = x.flatten(1) @ self.weight.T + self.bias
        return mean, self.log_var.expand_as(mean)


class LinearDecoder(nn.Module):
    """z -> W z + b as an image."""

    def __init__(self, weight: Tensor, bias: Tensor, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight, self.bias, self.shape = nn.Parameter(weight.float()), nn.Parameter(bias.float()), shape

    def forward(self, z: Tensor) -> Tensor:
        """(n, d) -> (n, c, h, w)."""
        return (z @ self.weight.T + self.bias).unflatten(1, self.shape)


class LinearGaussian:
    """z ~ N(0, I), x = W z + b + N(0, variance I): probabilistic PCA, with W's columns orthogonal.

    So log p(x) is a Gaussian's, and the posterior is a diagonal Gaussian, which a VAE's q can equal.
    Source: Tipping and Bishop (1999), equations 4 to 6.
    """

    shape = (1, 2, 3)
    variance = 0.3

    def __init__(self, latent_dim: int = 2) -> None:
        columns = [[1.0, 2.0, 0.0, -1.0, 0.5, 0.0], [2.0, -1.0, 1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 0.5, 1.5, -1.0, 1.0]]
        self.weight = torch.tensor(columns[:latent_dim], dtype=torch.float64).T
        self.bias = torch.tensor([0.1, -0.4, 0.3, 0.8, 0.0, -0.2], dtype=torch.float64)

    def x(self, n: int, seed: int = 0) -> Tensor:
        """n draws of p(x), (n, 1, 2, 3)."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, self.weight.shape[1], generator=generator, dtype=torch.float64)
        noise = math.sqrt(self.variance) * torch.randn(n, 6, generator=generator, dtype=torch.float64)
        return (z @ self.weight.T + self.bias + noise).float().unflatten(1, self.shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """The exact log p(x) in nats, (n,)."""
        covariance = self.weight @ self.weight.T + self.variance * torch.eye(6, dtype=torch.float64)
        return MultivariateNormal(self.bias, covariance).log_prob(x.flatten(1).double())

    def posterior(self, x: Tensor) -> Normal:
        """The exact p(z|x), (n, latent_dim)."""
        precision = 1.0 + self.weight.square().sum(0) / self.variance
        mean = (x.flatten(1).double() - self.bias) @ self.weight / self.variance / precision
        return Normal(mean, precision.rsqrt().expand_as(mean))

    def vae(self, shift: float = 0.0, scale: float = 1.0) -> VAE:
        """The model with q the exact posterior, moved by `shift` and its standard deviation multiplied by `scale`."""
        precision = 1.0 + self.weight.square().sum(0) / self.variance
        weight = self.weight.T / self.variance / precision[:, None]
        log_var = -precision.log() + 2.0 * math.log(scale)
        encoder = LinearEncoder(weight, shift - weight @ self.bias, log_var)
        decoder = LinearDecoder(self.weight, self.bias, self.shape)
        return VAE(
            encoder, decoder, FixedGaussian(self.shape, self.variance), StandardNormal(len(log_var))
        ).requires_grad_(requires_grad=False)


@pytest.fixture(scope="session")
def linear_gaussian() -> LinearGaussian:
    """The model whose every quantity is known."""
    return LinearGaussian()
