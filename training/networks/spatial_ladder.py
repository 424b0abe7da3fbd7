"""A ladder of spatial latents given what a trunk has seen: their prior, their posterior, and the decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from training.networks.trunk import PlainResidual
from training.strict import Strict, Widths

FIRST_LOG_STD = -1.5
"""Initial logarithm of the standard deviation of a pixel, in units of the noise."""
LOG_STD = (-5.0, 1.0)
"""Bounds of that logarithm."""
PRIOR_LOG_VAR = (-8.0, 3.0)
RELATIVE_LOG_VAR = (-8.0, 4.0)
"""Bounds of the posterior's log variance, less the prior's."""


class SpatialLadderSettings(Strict):
    """The latents: groups on several grids, whose prior is a function of the corrupted image.

    Source: Sonderby et al. (2016), "Ladder variational autoencoders"; Sohn et al. (2015), "Learning structured output
    representation using deep conditional generative models", for the prior given y.
    """

    channels: Widths = (32, 48, 64)
    """Channels at a half of the height and width, at a quarter, and so on."""
    latents: Widths = (4, 8, 16)
    """Numbers in z at each place of these grids."""
    free_nats: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.0, 0.05, 0.1)
    """Nats at each place of these grids below which the KL has no gradient."""

    @model_validator(mode="after")
    def _one_a_level(self) -> SpatialLadderSettings:
        if not len(self.channels) == len(self.latents) == len(self.free_nats):
            raise ValueError("channels, latents and free_nats need one number a level, as many as one another")
        return self

    def build(self, features: int, channels: int) -> SpatialLadder:
        """The network.

        Args:
            features: Channels of what the trunk has seen.
            channels: Channels of an image.
        """
        return SpatialLadder(features, channels, self.channels, self.latents)


class GroupOfLatents(NamedTuple):
    """One group, (n, k, h/f, w/f) each.

    Attributes:
        z: A draw.
        mean: Of the prior given the groups above.
        log_var: Likewise.
        kl: KL of the posterior from that prior in nats, of each number; None where z is a draw of the prior.
    """

    z: Tensor
    mean: Tensor
    log_var: Tensor
    kl: Tensor | None


class Completion(NamedTuple):
    """What the decoder makes of a draw: p(e | z, y) of the error e = (x - E[x | y]) / sigma.

    Attributes:
        mean: (n, c, h, w).
        log_std: Shaped like it.
        groups: The groups, the finest first.
    """

    mean: Tensor
    log_std: Tensor
    groups: list[GroupOfLatents]


class SpreadHead(nn.Module):
    """The decoder without latents: features -> logarithm of the standard deviation of e, (n, c, h, w)."""

    def __init__(self, features: int, channels: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(features, width, 1)
        self.block = PlainResidual(width)
        self.last = nn.Conv2d(width, 4 * channels, 3, padding=1)
        _start_at(self.last, FIRST_LOG_STD)

    def forward(self, features: Tensor) -> Tensor:
        """(n, k, h/2, w/2) -> (n, c, h, w)."""
        found = self.last(functional.relu(self.block(self.enter(features))))
        return functional.pixel_shuffle(found.float(), 2).clamp(*LOG_STD)


class Pyramid(nn.Module):
    """The way up: features at a half of the height and width -> features of each grid, the finest first."""

    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.enter = nn.Conv2d(inputs, widths[0], 1)
        self.blocks = nn.ModuleList(PlainResidual(width) for width in widths)
        self.downs = nn.ModuleList(nn.Conv2d(fine, coarse, 2, stride=2) for fine, coarse in pairwise(widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(n, inputs, h/2, w/2) -> one tensor a grid."""
        found = [self.blocks[0](self.enter(x))]
        for down, block in zip(self.downs, list(self.blocks)[1:], strict=True):
            found.append(block(down(functional.relu(found[-1]))))
        return found


class SpatialStep(nn.Module):
    """One group: its prior given the state above, its posterior, which begins as the prior, and the state below it."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.p = nn.Conv2d(width, 2 * latents, 1)
        self.q = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.ReLU(), nn.Conv2d(width, 2 * latents, 1))
        self.enter = nn.Conv2d(latents, width, 1)
        self.block = PlainResidual(width)
        for convolution in (self.p, self.q[2]):
            _start_at(convolution, 0.0)

    def draw(self, state: Tensor, truth: Tensor | None, eps: Tensor) -> GroupOfLatents:
        """A draw of the posterior; of the prior where nothing is known of the truth."""
        mean, log_var = self.p(functional.relu(state)).float().chunk(2, 1)
        log_var = log_var.clamp(*PRIOR_LOG_VAR)
        std = torch.exp(0.5 * log_var)
        if truth is None:
            return GroupOfLatents(mean + std * eps, mean, log_var, None)
        both = functional.relu(torch.cat([state, truth], 1))
        shift, wider = self.q(both).float().chunk(2, 1)
        wider = wider.clamp(*RELATIVE_LOG_VAR)
        z = mean + std * (shift + torch.exp(0.5 * wider) * eps)
        return GroupOfLatents(z, mean, log_var, 0.5 * (shift.square() + wider.exp() - 1.0 - wider))

    def forward(self, state: Tensor, z: Tensor) -> Tensor:
        """The state below."""
        found: Tensor = self.block(state + self.enter(z))
        return found


class SpatialLadder(nn.Module):
    """p(z | y), q(z | x, y) and p(e | z, y), all given features of a trunk.

    Args:
        features: Channels of the features.
        channels: Channels of an image.
        widths: Channels of each grid, finest first.
        latents: Numbers in z at each place of it.
    """

    def __init__(self, features: int, channels: int, widths: Sequence[int], latents: Sequence[int]) -> None:
        super().__init__()
        self.channels, self.latents = channels, tuple(latents)
        self.seen = Pyramid(features, widths)
        self.error = Pyramid(4 * channels + widths[0], widths)
        self.steps = nn.ModuleList(SpatialStep(width, k) for width, k in zip(widths, latents, strict=True))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairwise(widths))
        self.last = nn.Conv2d(widths[0], 8 * channels, 3, padding=1)
        _start_at(self.last, 0.0)
        with torch.no_grad():
            self.last.bias[4 * channels :] = FIRST_LOG_STD  # type: ignore[index]
        self.head = SpreadHead(features, channels, widths[0])

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many places of each grid lie along one side of a place of the coarsest, finest first."""
        return tuple(2**level for level in reversed(range(len(self.latents))))

    @property
    def depth(self) -> int:
        """Numbers in z at each place of the coarsest grid, where the finer ones are packed by space-to-depth."""
        return sum(k * block**2 for k, block in zip(self.latents, self.blocks, strict=True))

    @property
    def multiple_of(self) -> int:
        """Height and width in pixels of a place of the coarsest grid."""
        return int(2 ** len(self.latents))

    def packed(self, groups: Sequence[Tensor]) -> Tensor:
        """Tensors of all groups, finest first, as one on the coarsest grid, the coarsest group first."""
        parts = [functional.pixel_unshuffle(group, block) for group, block in zip(groups, self.blocks, strict=True)]
        return torch.cat(parts[::-1], 1)

    def unpacked(self, z: Tensor) -> list[Tensor]:
        """The inverse of `packed`: (n, depth, h, w) -> one tensor a group."""
        sizes = [k * block**2 for k, block in zip(self.latents, self.blocks, strict=True)]
        parts = z.split(sizes[::-1], 1)[::-1]
        return [functional.pixel_shuffle(part, block) for part, block in zip(parts, self.blocks, strict=True)]

    def noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal noise for one draw of z for images (n, c, h, w), packed."""
        height, width = (side // self.multiple_of for side in like.shape[2:])
        shape = (len(like), self.depth, height, width)
        return torch.randn(shape, generator=generator, device=like.device)

    def forward(self, features: Tensor, eps: Tensor, error: Tensor | None = None) -> Completion:
        """Draw z, and decode it.

        Args:
            features: Of the trunk, (n, k, h/2, w/2).
            eps: Standard normal noise (n, depth, h/f, w/f).
            error: e = (x - E[x | y]) / sigma, (n, c, h, w): z is then a draw of q(z | x, y), else of p(z | y).
        """
        seen, noise = self.seen(features), self.unpacked(eps)
        truth: list[Tensor | None] = [None] * len(self.latents)
        if error is not None:
            blocks = functional.pixel_unshuffle(error, 2)
            truth = self.error(torch.cat([blocks, seen[0].detach()], 1))
        groups: list[GroupOfLatents] = []
        state = seen[-1]
        for level in reversed(range(len(self.latents))):
            step = self.steps[level]
            groups.insert(0, step.draw(state, truth[level], noise[level]))  # type: ignore[operator]
            state = step(state, groups[0].z)
            if level:
                state = self.ups[level - 1](functional.relu(state)) + seen[level - 1]
        found = functional.pixel_shuffle(self.last(functional.relu(state)).float(), 2)
        mean, log_std = found.split(self.channels, 1)
        return Completion(mean, log_std.clamp(*LOG_STD), groups)


def log_density(error: Tensor, log_std: Tensor) -> Tensor:
    """log N(e; 0, std) in nats, elementwise."""
    return -0.5 * (error * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2.0 * math.pi)


def _start_at(convolution: nn.Module, bias: float) -> None:
    nn.init.zeros_(convolution.weight)  # type: ignore[arg-type]
    nn.init.constant_(convolution.bias, bias)  # type: ignore[arg-type]
