"""The interface of distributions: base classes of likelihoods p(x|z) and priors p(z)."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor, nn

from training.distributions.gaussian import DiagonalGaussian

LEVELS = 256
"""Grey levels of a pixel of eight bits."""


class Support(IntEnum):
    """Values to which a distribution gives a probability; each set contains those before it."""

    BINARY = 0
    """0 and 1."""
    EIGHT_BIT = 1
    """Whole 255ths from 0 to 1."""
    REAL = 2
    """All real numbers."""

    def contains(self, x: Tensor) -> bool:
        """Whether every element of x is in the set, 255ths as exactly as float32 has them."""
        if self is Support.BINARY:
            return bool(((x == 0) | (x == 1)).all())
        if self is Support.EIGHT_BIT:
            level = x * (LEVELS - 1)
            return bool(((level - level.round()).abs() < 1e-3).all() and x.min() >= 0 and x.max() <= 1)
        return bool(x.isfinite().all())


class Distribution(nn.Module):
    """A distribution of tensors of one shape; a module, because it may have parameters."""

    support: Support = Support.REAL
    """Values of each element."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)


class Likelihood(Distribution):
    """p(x|z), given the decoder's output `parameters`, which is shaped like the image x.

    A subclass gives `log_prob` and `draw`; `mean` is right where the parameters are logits of E[x|z].
    """

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Log p(x|z) in nats, summed over channels and pixels: (..., c, h, w) -> (...)."""
        raise NotImplementedError

    def mean(self, parameters: Tensor) -> Tensor:
        """E[x|z] in [0, 1], shaped like `parameters`."""
        return torch.sigmoid(parameters)

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """x ~ p(x|z) in [0, 1], shaped like `parameters`."""
        raise NotImplementedError

    def dream(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """x ~ p(x|z) on which the sleep phase of wake-sleep trains the encoder, shaped like `parameters`."""
        return self.draw(parameters, generator)

    def check(self, x: Tensor) -> None:
        """Refuse images that have no probability.

        Raises:
            ValueError: A pixel lies outside the support.
        """
        if not self.support.contains(x):
            remedy = "binarise the images first" if self.support is Support.BINARY else "round them to whole 255ths"
            raise ValueError(f"{type(self).__name__} gives these pixel values no probability; {remedy}")


class Prior(Distribution):
    """p(z) as the image of standard normal noise.

    A subclass gives `log_prob` and `draw`, and `noise_shape` where the noise is not shaped like z.
    """

    uses_encoder = False
    """Whether the density contains the VAE's own encoder."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape)
        self.noise_shape = self.event_shape
        """Of the standard normal noise that makes one z."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(z) in nats: (..., d) -> (...)."""
        raise NotImplementedError

    def draw(self, eps: Tensor) -> Tensor:
        """z ~ p(z) for eps ~ N(0, I): (n, *noise_shape) -> (n, *event_shape)."""
        raise NotImplementedError

    def frozen(self) -> Prior:
        """The same density with no more than inference needs once training is over."""
        return self

    def kl(self, posterior: DiagonalGaussian, z: Tensor) -> Tensor:
        """Estimate KL(posterior || prior) in nats: the entropy in closed form, the rest as the mean over the draws.

        Args:
            posterior: q(z|x) of n images.
            z: Draws of it, (L, n, d).

        Returns:
            (n,).

        Source: Kingma and Welling (2013), equation 6, with the part of it that has a closed form in that form.
        """
        # As a matrix: in an ONNX graph, products of three axes would depend on the number of rows.
        log_prob = self.log_prob(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        return -posterior.entropy() - log_prob.mean(0)
