"""Discretised logistic p(x|z): a probability for each of 256 grey levels, which bits per dimension need."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.distributions.interface import LEVELS, Likelihood, Support
from training.strict import Strict

LEAST_LOG_SCALE, LARGEST_LOG_SCALE = -6.0, 0.0


class DiscretisedLogisticSettings(Strict):
    """A logistic distribution over [0, 1], integrated over each of 256 grey levels; one learned scale a pixel.

    Source: Kingma et al. (2016), section 5.2 and appendix; Salimans et al. (2017), section 2.1.
    """

    support: ClassVar[Support] = Support.EIGHT_BIT
    likelihood: Literal["discretised_logistic"]
    """256 levels a channel."""

    def build(self, shape: tuple[int, int, int]) -> DiscretisedLogistic:
        """The likelihood of images of that shape."""
        return DiscretisedLogistic(shape)


class DiscretisedLogistic(Likelihood):
    """Independent pixels; `parameters` are logits of the location, shaped like the image; x holds whole 255ths.

    `mean` is the location: E[x|z] but for what the edges cut off.
    """

    support = DiscretisedLogisticSettings.support

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        self.log_scale = nn.Parameter(torch.full(shape, -3.0))

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Log P(x|z) in nats, summed over channels and pixels: (..., c, h, w) -> (...).

        The outermost levels take the tails, so that the levels' probabilities sum to 1.
        """
        inverse_scale = torch.exp(-self._bounded_log_scale())
        level = (x * (LEVELS - 1)).round()
        location = torch.sigmoid(parameters)
        upper = (level + 1.0 - LEVELS * location) / LEVELS * inverse_scale
        lower = (level - LEVELS * location) / LEVELS * inverse_scale
        upper = torch.where(level >= LEVELS - 1, torch.full_like(upper, math.inf), upper)
        lower = torch.where(level <= 0, torch.full_like(lower, -math.inf), lower)
        return log_difference_of_sigmoids(upper, lower).flatten(-3).sum(-1)

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """x ~ P(x|z), whole 255ths, shaped like `parameters`."""
        noise = torch.logit(torch.rand(parameters.shape, generator=generator, device=parameters.device))
        value = self.mean(parameters) + self._bounded_log_scale().exp() * noise
        return (LEVELS * value).floor().clamp(0, LEVELS - 1) / (LEVELS - 1)

    def _bounded_log_scale(self) -> Tensor:
        return self.log_scale.clamp(LEAST_LOG_SCALE, LARGEST_LOG_SCALE)


def log_difference_of_sigmoids(upper: Tensor, lower: Tensor) -> Tensor:
    """Log(sigmoid(upper) - sigmoid(lower)) for upper > lower, exact where both lie far out in a tail.

    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)).
    """
    return functional.logsigmoid(upper) + functional.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
