"""The diagonal Gaussian."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_2_PI = math.log(2.0 * math.pi)


class DiagonalGaussian(NamedTuple):
    """N(mean, diag(exp(log_var))) over the last axis; both tensors are (..., d)."""

    mean: Tensor
    log_var: Tensor

    def draw(self, eps: Tensor) -> Tensor:
        """z = mean + std * eps for eps ~ N(0, I), differentiable in both parameters.

        Args:
            eps: (..., d), broadcast against the parameters.

        Source: Kingma and Welling (2013), section 2.4.
        """
        return self.mean + torch.exp(0.5 * self.log_var) * eps

    def log_prob(self, z: Tensor) -> Tensor:
        """Log N(z; mean, diag(exp(log_var))) in nats, summed over the last axis."""
        square = (z - self.mean).square() * torch.exp(-self.log_var)
        return -0.5 * self.total(square + self.log_var + LOG_2_PI)

    def entropy(self) -> Tensor:
        """Return -E[log q(z)] in nats, in closed form, summed over the last axis."""
        return 0.5 * self.total(self.log_var + 1.0 + LOG_2_PI)

    def kl_from_standard_normal(self) -> Tensor:
        """KL(N(mean, std^2) || N(0, I)) in nats, in closed form, summed over the last axis.

        Source: Kingma and Welling (2013), appendix B.
        """
        return 0.5 * self.total(self.mean.square() + self.log_var.exp() - 1.0 - self.log_var)

    def detach(self) -> DiagonalGaussian:
        """The same distribution without gradients in its parameters."""
        return type(self)(self.mean.detach(), self.log_var.detach())

    def total(self, values: Tensor) -> Tensor:
        """The sum over the axes of one z."""
        return values.sum(-1)


class SpatialGaussian(DiagonalGaussian):
    """The same over the last three axes; both tensors are (..., c, h, w), and what is summed is over all three."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over the axes of one z."""
        return values.flatten(-3).sum(-1)


def of_rows(mean: Tensor, log_var: Tensor) -> DiagonalGaussian:
    """The Gaussians of n rows, in float32: of mean and log_var (n, d) or (n, c, h, w)."""
    return (SpatialGaussian if mean.ndim == 4 else DiagonalGaussian)(mean.float(), log_var.float())
