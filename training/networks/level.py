"""The network that estimates the noise of a photograph: how strong it is, and of which kind."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.strict import Positive, Strict

FIRST_LOG_LEVEL = -3.0
LOG_WEIGHT = (-8.0, 8.0)
"""Bounds of the logarithm of a place's weight."""


class LevelSettings(Strict):
    """The network that estimates levels: convolutions, then a weighted mean over all places."""

    width: Positive = 32
    """Channels."""
    layers: Positive = 4
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
    """y and mask to a `NoiseEstimate`: each place gives its three numbers, and their weights in the image's means."""

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for number in range(layers):
            parts += [nn.Conv2d(width if number else 4 * (channels + 1), width, 3, padding=1), nn.ReLU()]
        self.convs = nn.Sequential(*parts)
        self.last = nn.Conv2d(width, 6, 1)
        nn.init.zeros_(self.last.weight)
        with torch.no_grad():
            self.last.bias.copy_(torch.tensor([FIRST_LOG_LEVEL, FIRST_LOG_LEVEL, 0.0, 0.0, 0.0, 0.0]))  # type: ignore[union-attr]

    def forward(self, y: Tensor, mask: Tensor) -> NoiseEstimate:
        """Map y and mask (n, c, h, w), both sides even; places with missing pixels have next to no weight."""
        seen = mask.amin(1, keepdim=True)
        centred = torch.where(seen > 0.0, y - 0.5, 0.0)
        blocks = functional.pixel_unshuffle(torch.cat([centred, seen], 1), 2)
        values, weights = self.last(self.convs(blocks)).float().chunk(2, 1)
        whole = -functional.max_pool2d(-seen, 2)
        weights = weights.clamp(*LOG_WEIGHT).exp() * (whole + 1e-6)
        return NoiseEstimate(*((values * weights).sum((2, 3)) / weights.sum((2, 3))).unbind(1))
