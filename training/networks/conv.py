"""Residual convolutional encoder and decoder for images of any size."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from training.networks.mlp import MlpEncoder
from training.strict import Positive, Strict, Widths


class Conv(Strict):
    """Residual convolutions, each level at half the height and width of the one before, rounding up.

    Encoder and decoder have the same levels.
    """

    architecture: Literal["conv"]
    """Residual convolutions."""
    channels: Widths = (24, 48)
    """Channels of each level, finest first; each level halves height and width."""
    blocks: Annotated[int, Field(ge=0)] = 1
    """Residual blocks a level."""
    head: Positive = 12
    """Channels at full size before the last convolution."""

    def encoder(self, shape: tuple[int, int, int], latent_dim: int) -> nn.Module:
        """x (n, *shape) -> mean, log_var (n, latent_dim)."""
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((shape[0], *self.channels)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), *self._blocks(outputs)]
        height, width = self._sizes(shape)[-1]
        body = nn.Sequential(*layers, nn.SiLU(), nn.Flatten())
        return MlpEncoder(body, self.channels[-1] * height * width, latent_dim)

    def decoder(self, latent_dim: int, shape: tuple[int, int, int]) -> nn.Module:
        """z (n, latent_dim) -> parameters of p(x|z) (n, *shape)."""
        sizes = self._sizes(shape)[::-1]
        widths = (*self.channels[::-1], self.head)
        first = (widths[0], *sizes[0])
        layers: list[nn.Module] = [nn.Linear(latent_dim, math.prod(first)), nn.Unflatten(1, first)]
        for (inputs, outputs), size in zip(pairwise(widths), sizes[1:], strict=True):
            layers += [*self._blocks(inputs), nn.SiLU(), Upsample(inputs, outputs, size)]
        return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(self.head, shape[0], 3, padding=1))

    def _blocks(self, channels: int) -> list[nn.Module]:
        return [Residual(channels) for _ in range(self.blocks)]

    def _sizes(self, shape: tuple[int, int, int]) -> list[tuple[int, int]]:
        """Height and width at full size, then after each level of the encoder."""
        sizes = [(shape[1], shape[2])]
        for _ in self.channels:
            height, width = sizes[-1]
            sizes.append(((height + 1) // 2, (width + 1) // 2))
        return sizes


class Residual(nn.Module):
    """x + f(x), f two 3 x 3 convolutions after activations; the second starts at 0, so f starts at 0.

    Training drops the share `dropout` of the channels between the two.
    """

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.constant_(self.second.bias, 0.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> the same shape."""
        hidden = functional.silu(self.first(functional.silu(x)))
        return x + self.second(functional.dropout2d(hidden, self.dropout, self.training))


class Upsample(nn.Module):
    """Doubles height and width by sub-pixel convolution, then crops to `size`.

    Source: Shi et al. (2016), section 3.2.
    """

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int], kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 4 * outputs, kernel, padding=kernel // 2)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, *size)."""
        height, width = self.size
        return functional.pixel_shuffle(self.conv(x), 2)[..., :height, :width]
