"""A residual U-Net: an image to planes of the same size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional

from training.networks.conv import Residual, Upsample
from training.strict import Positive, Strict, Widths


class UNetSettings(Strict):
    """A U-Net of residual blocks."""

    channels: Widths = (16, 32)
    """Channels of each level, full size first."""
    blocks: Positive = 1
    """Residual blocks a level."""

    def network(self, inputs: int, outputs: int, size: tuple[int, int] | None) -> nn.Module:
        """(n, inputs, *size) -> (n, outputs, *size); without a size, images of any multiples of 2^(levels - 1)."""
        return UNet(inputs, outputs, size, self.channels, self.blocks)


class UNet(nn.Module):
    """Residual blocks at full size and at each halved size, on the way down and on the way up.

    `channels` has one entry a level, full size first; `blocks` is the number of blocks a level and way. The output
    starts at 0.
    Source: Ronneberger et al. (2015), figure 1, with sums in place of concatenation.
    """

    def __init__(
        self, inputs: int, outputs: int, size: tuple[int, int] | None, channels: Sequence[int], blocks: int = 1
    ) -> None:
        super().__init__()
        sizes = [size]
        for _ in channels[1:]:
            sizes.append(None if size is None else ((size[0] + 1) // 2, (size[1] + 1) // 2))
            size = sizes[-1]
        self.first = nn.Conv2d(inputs, channels[0], 3, padding=1)
        self.levels = nn.ModuleList(_blocks(width, blocks) for width in channels)
        self.down = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in pairwise(channels)
        )
        self.up = nn.ModuleList(
            Upsample(coarse, fine, size) for (fine, coarse), size in zip(pairwise(channels), sizes[:-1], strict=True)
        )
        self.merged = nn.ModuleList(_blocks(width, blocks) for width in channels[:-1])
        self.last = nn.Conv2d(channels[0], outputs, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, 0.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h, w)."""
        found: Tensor = self.last(functional.silu(walk(self, x, functional.silu)))
        return found


class Levels(Protocol):
    """The parts of a U-Net that `walk` passes, full size first."""

    @property
    def first(self) -> nn.Module:
        """The convolution before all levels."""

    levels: nn.ModuleList
    down: nn.ModuleList
    up: nn.ModuleList
    merged: nn.ModuleList


def walk(net: Levels, x: Tensor, activation: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """The features at full size after the way down and the way up.

    Args:
        net: The U-Net.
        x: (n, inputs, h, w).
        activation: Applied before each change of size.
    """
    x = net.levels[0](net.first(x))
    passed: list[Tensor] = []
    for down, level in zip(net.down, list(net.levels)[1:], strict=True):
        passed.append(x)
        x = level(down(activation(x)))
    for up, merged in zip(reversed(net.up), reversed(net.merged), strict=True):
        x = merged(passed.pop() + up(activation(x)))
    return x


def _blocks(channels: int, number: int) -> nn.Sequential:
    return nn.Sequential(*(Residual(channels) for _ in range(number)))
