"""Bernoulli p(x|z): the decoder gives one logit a pixel."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from training.distributions.interface import Likelihood, Support
from training.strict import Strict


class BernoulliSettings(Strict):
    """Independent Bernoulli pixels."""

    support: ClassVar[Support] = Support.BINARY
    likelihood: Literal["bernoulli"] = "bernoulli"
    """Black or white pixels."""

    def build(self, shape: tuple[int, int, int]) -> Bernoulli:
        """The likelihood of images of that shape."""
        return Bernoulli(shape)


class Bernoulli(Likelihood):
    """Independent Bernoulli pixels; `parameters` are logits shaped like the image.

    For grey levels x in [0, 1] `log_prob` is the expectation of the log-likelihood over the binarisations
    b ~ Bernoulli(x). Its exponential is not a density of x: it may enter a bound, but no importance weight.
    """

    support = BernoulliSettings.support

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Log p(x|z) in nats, summed over channels and pixels: (..., c, h, w) -> (...).

        Source: Kingma and Welling (2013), appendix C.1, equation 11.
        """
        x = x.expand(parameters.shape)
        losses = functional.binary_cross_entropy_with_logits(parameters, x, reduction="none")
        return -losses.flatten(-3).sum(-1)

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """x ~ p(x|z), each pixel 0 or 1, shaped like `parameters`."""
        return torch.bernoulli(self.mean(parameters), generator=generator)
