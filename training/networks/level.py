"""The network that estimates the noise of a photograph: how strong it is, and of which kind."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.strict import Positive, Strict

FIRST_LOG_LEVEL = -3.0
MAGNIFIED = 12.0
"""What details are multiplied by: those of noise are small beside the image's range."""
HEADS = 4
"""Weighted means over all places, each with weights of its own."""
HIDDEN = 64
LOG_WEIGHT = (-8.0, 8.0)
"""Bounds of the logarithm of a place's weight."""
LEAST_MEAN = 1e-3
"""Added to means, of which logarithms are taken."""


class LevelSettings(Strict):
    """The network that estimates levels: convolutions, weighted means over all places, a perceptron of their logs."""

    width: Positive = 32
    """Channels."""
    layers: Positive = 3
    """3 x 3 convolutions."""

    def build(self, channels: int) -> LevelNetwork:
        """The network for images of so many channels."""
        return LevelNetwork(channels, self.width, self.layers)


class NoiseEstimate(NamedTuple):
    """What noise an image has, (n,) each.

    Attributes:
        log_gaussian: Logarithm of the level if the noise is Gaussian.
        log_processed: Logarithm of the level if it is processed.
        logit: Log odds that it is processed.
    """

    log_gaussian: Tensor
    log_processed: Tensor
    logit: Tensor


class LevelNetwork(nn.Module):
    """y and mask to a `NoiseEstimate`: strengths of details, averaged where they tell noise best.

    A level is a product of strengths rather than a sum, so that their logarithms pass the perceptron.
    """

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for number in range(layers):
            parts += [nn.Conv2d(width if number else 4 * (2 * channels + 1), width, 3, padding=1), nn.ReLU()]
        self.convs = nn.Sequential(*parts)
        self.weights = nn.Conv2d(width, HEADS, 1)
        nn.init.zeros_(self.weights.bias)  # type: ignore[arg-type]
        self.first, self.last = nn.Linear(HEADS * width, HIDDEN), nn.Linear(HIDDEN, 3)
        nn.init.zeros_(self.last.weight)
        with torch.no_grad():
            self.last.bias.copy_(torch.tensor([FIRST_LOG_LEVEL, FIRST_LOG_LEVEL, 0.0]))

    def forward(self, y: Tensor, mask: Tensor) -> NoiseEstimate:
        """Map y and mask (n, c, h, w), both sides even; places with missing pixels have next to no weight."""
        seen = mask.amin(1, keepdim=True)
        centred = torch.where(seen > 0.0, y - 0.5, 0.0)
        details = centred - functional.avg_pool2d(functional.pad(centred, (1, 1, 1, 1), mode="reflect"), 3, 1)
        found = self.convs(functional.pixel_unshuffle(torch.cat([MAGNIFIED * details, centred, seen], 1), 2)).float()
        whole = -functional.max_pool2d(-seen, 2)
        weights = (self.weights(found).float().clamp(*LOG_WEIGHT).exp() * (whole + 1e-6)).flatten(2)
        means = weights @ found.flatten(2).mT / weights.sum(2, keepdim=True)
        hidden = functional.relu(self.first((means.flatten(1) + LEAST_MEAN).log()))
        return NoiseEstimate(*self.last(hidden).unbind(1))
