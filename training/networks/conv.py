"""Residual convolutional encoder and decoder for images of any size."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from training.networks.mlp import MlpEncoder
from training.networks.network import Network
from training.strict import Positive, Widths


class Conv(Network):
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
    latents: Literal["vector", "spatial", "pooled"] = "vector"
    """`vector`: linear layers between the coarsest level and z, for images of one size. `spatial`: none, so z has
    `latent_dim` numbers at each place of the coarsest level, and the model takes images of any size whose height and
    width are multiples of 2^levels. `pooled`: linear layers after the mean of all places, for a `level_network` of
    images of any size."""

    @property
    def multiple_of(self) -> int | None:
        """What divides height and width of images of any size; None where images have one size."""
        return {"vector": None, "spatial": 2 ** len(self.channels), "pooled": 1}[self.latents]

    def latent_shape(self, latent_dim: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Of one z, for images of that shape."""
        return (latent_dim, *self._sizes(shape)[-1]) if self.latents == "spatial" else (latent_dim,)

    def encoder(self, shape: tuple[int, int, int], latent_dim: int) -> nn.Module:
        """x (n, *shape) -> mean, log_var (n, *latent_shape)."""
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((shape[0], *self.channels)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), *self._blocks(outputs)]
        width = self.channels[-1]
        if self.latents == "spatial":
            head = partial(nn.Conv2d, kernel_size=1)
            return MlpEncoder(nn.Sequential(*layers, nn.SiLU()), width, latent_dim, head)
        if self.latents == "pooled":
            layers += [nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            return MlpEncoder(nn.Sequential(*layers), width, latent_dim)
        layers += [nn.SiLU(), nn.Flatten()]
        return MlpEncoder(nn.Sequential(*layers), width * math.prod(self._sizes(shape)[-1]), latent_dim)

    def decoder(self, latent_dim: int, shape: tuple[int, int, int]) -> nn.Module:
        """z (n, *latent_shape) -> parameters of p(x|z) (n, *shape)."""
        widths = (*self.channels[::-1], self.head)
        sizes: list[tuple[int, int] | None] = [*self._sizes(shape)[-2::-1]]
        if self.latents == "spatial":
            layers: list[nn.Module] = [nn.Conv2d(latent_dim, widths[0], 3, padding=1)]
            sizes = [None] * len(sizes)  # of any size
        else:
            first = (widths[0], *self._sizes(shape)[-1])
            layers = [nn.Linear(latent_dim, math.prod(first)), nn.Unflatten(1, first)]
        for (inputs, outputs), size in zip(pairwise(widths), sizes, strict=True):
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
    """Doubles height and width by sub-pixel convolution, then crops to `size`, if there is one.

    Source: Shi et al. (2016), section 3.2.
    """

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int] | None, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 4 * outputs, kernel, padding=kernel // 2)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, *size), or (n, outputs, 2 h, 2 w) without a size."""
        doubled = functional.pixel_shuffle(self.conv(x), 2)
        return doubled if self.size is None else doubled[..., : self.size[0], : self.size[1]]
