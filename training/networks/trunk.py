"""The trunk of a conditional model: a corrupted image, a map of its noise and the kind of noise to E[x | y]."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional

from training.networks.eight_bits import EightBitConv2d
from training.networks.unet import walk
from training.strict import Positive, Strict, Widths

LIKE_SIGMA = 25.0 / 255.0
"""Standard deviation that the noise has after the image is divided by its own."""
LEAST_SIGMA = 5.0 / 255.0
"""Weaker noise is not brought up to `LIKE_SIGMA`, so that images stay of order 1."""


class TrunkSettings(Strict):
    """The trunk: the network that gives E[x | y], a U-Net on blocks of 2 x 2 pixels.

    Source: Zhang et al. (2018), "FFDNet", for the blocks and the map of sigma; Zhang et al. (2021), "DRUNet", for the
    residual levels.
    """

    channels: Widths = (48, 96, 160)
    """Channels at a half of the height and width, at a quarter, and so on."""
    blocks: Positive | Widths = 2
    """Residual blocks a way, of every level or of each."""
    eight_bits: bool | tuple[bool, ...] = False
    """Whether convolutions of every level, or of each, and of the way down to it, have eight bits."""

    @model_validator(mode="after")
    def _as_many_as_levels(self) -> Self:
        for key in ("blocks", "eight_bits"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != len(self.channels):
                raise ValueError(f"{key} has {len(value)} values and channels {len(self.channels)}: give one a level")
        return self

    @property
    def multiple_of(self) -> int:
        """What divides height and width of the images."""
        return int(2 ** len(self.channels))

    def build(self, channels: int) -> Trunk:
        """The network for images of so many channels."""
        levels = len(self.channels)
        blocks = self.blocks if isinstance(self.blocks, tuple) else (self.blocks,) * levels
        eight_bits = self.eight_bits if isinstance(self.eight_bits, tuple) else (self.eight_bits,) * levels
        return Trunk(channels, self.channels, blocks, eight_bits)


class PlainResidual(nn.Module):
    """x + f(x), f two 3 x 3 convolutions with a ReLU between them; f starts small.

    Args:
        channels: Of x.
        eight_bits: Whether the convolutions have eight bits.
    """

    def __init__(self, channels: int, *, eight_bits: bool = False) -> None:
        super().__init__()
        self.first = _convolution(channels, channels, 3, padding=1, eight_bits=eight_bits, answers=False)
        self.second = _convolution(channels, channels, 3, padding=1, eight_bits=eight_bits)
        _start_small(self.second)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> the same shape."""
        found: Tensor = x + self.second(functional.relu(self.first(x)))
        return found


class Trunk(nn.Module):
    """E[x | y, sigma, kind] = y - sigma r, r a U-Net without normalisation.

    The U-Net sees the image twice, as it is and in units of its noise: r is in these units too, and convolutions with
    ReLUs would have to learn the division. After 4 minutes of a core that gains 0.1 dB at sigma 15 and 25, 0.3 at 50.

    Args:
        channels: Channels of an image.
        widths: Channels of each level, finest first.
        blocks: Residual blocks a way, of each level.
        eight_bits: Whether convolutions of each level, and of the way down to it, have eight bits. Rounding costs
            0.004 dB at the two coarser levels of three, and 0.1 dB at the finest.
    """

    def __init__(self, channels: int, widths: Sequence[int], blocks: Sequence[int], eight_bits: Sequence[bool]) -> None:
        super().__init__()
        self.width = widths[0]
        self.first = nn.Conv2d(4 * (2 * channels + 1) + 1, widths[0], 3, padding=1)
        ways = list(zip(widths, blocks, eight_bits, strict=True))
        self.levels = nn.ModuleList(_residuals(*way) for way in ways)
        self.down = nn.ModuleList(
            _convolution(fine, coarse, 2, stride=2, eight_bits=rounded)
            for (fine, *_), (coarse, _, rounded) in pairwise(ways)
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairwise(widths))
        self.merged = nn.ModuleList(_residuals(*way) for way in ways[:-1])
        self.last = nn.Conv2d(widths[0], 4 * channels, 3, padding=1)
        _start_small(self.last)

    def features(self, y: Tensor, sigma: Tensor, kind: Tensor) -> Tensor:
        """What the trunk has seen of an image, at half its height and width.

        Args:
            y: (n, c, h, w), in [0, 1] but for the noise.
            sigma: Standard deviation of the noise of each pixel, (n, 1, h, w).
            kind: Kind of the noise of each block of 2 x 2 pixels, (n, 1, h/2, w/2).

        Returns:
            (n, width, h/2, w/2).
        """
        centred = y - 0.5
        in_noise = centred * (LIKE_SIGMA / sigma.clamp(min=LEAST_SIGMA))
        blocks = functional.pixel_unshuffle(torch.cat([centred, sigma, in_noise], 1), 2)
        return walk(self, torch.cat([blocks, kind], 1))

    def residual(self, features: Tensor) -> Tensor:
        """r, (n, c, h, w), of the features."""
        return functional.pixel_shuffle(self.last(features).float(), 2)


def _residuals(channels: int, number: int, eight_bits: bool) -> nn.Sequential:
    return nn.Sequential(*(PlainResidual(channels, eight_bits=eight_bits) for _ in range(number)))


def _convolution(*shape: Any, eight_bits: bool, answers: bool = True, **options: Any) -> nn.Conv2d:
    return EightBitConv2d(*shape, answers=answers, **options) if eight_bits else nn.Conv2d(*shape, **options)


def _start_small(convolution: nn.Conv2d) -> None:
    with torch.no_grad():
        convolution.weight.mul_(0.1)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
