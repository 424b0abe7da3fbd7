"""A ladder: a residual network up from the image, and one down again that draws a group of latents at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from training.distributions.gaussian import DiagonalGaussian, of_rows
from training.errors import ConfigError
from training.networks.conv import Residual, Upsample
from training.networks.mlp import MlpEncoder
from training.networks.network import Network
from training.strict import Widths


class Ladder(Network):
    """Residual convolutions with several groups of latents at each level, below the vector of `latent_dim` numbers.

    Each level has half the height and width of the one before. The vector lies above the coarsest level, and
    `[model.prior]` is its prior. The other groups have conditional priors, which the network down computes. Without a
    vector the network takes images of any size.
    Source: Sonderby et al. (2016), "Ladder variational autoencoders"; Vahdat and Kautz (2020), "NVAE"; Child (2021),
    "Very deep VAEs".
    """

    architecture: Literal["ladder"]
    """Top-down inference with groups of spatial latents."""
    channels: Widths = (32, 64)
    """Channels of each level, finest first; each level halves height and width, which must be equal and
    divide."""
    groups: Widths = (2, 3)
    """Groups of latents at each level."""
    latents: Widths = (4, 8)
    """Channels of a group at each level."""
    blocks: Annotated[int, Field(ge=0)] = 1
    """Residual blocks a level on the way up; on the way down each group has one."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the values that training drops inside each block on the way down."""
    top: Literal["vector", "spatial"] = "vector"
    """`vector`: a vector lies above the coarsest level. `spatial`: none, so the model takes images of any size whose
    height and width are multiples of 2^levels."""

    @model_validator(mode="after")
    def _one_a_level(self) -> Ladder:
        if not len(self.channels) == len(self.groups) == len(self.latents):
            raise ValueError("channels, groups and latents need one number a level, as many as one another")
        return self

    @property
    def multiple_of(self) -> int | None:
        """What divides height and width of images of any size; None where images have one size."""
        return 2 ** len(self.channels) if self.top == "spatial" else None

    def latent_shape(self, latent_dim: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Of the vector; without one, of all groups, each packed into the coarsest grid by space-to-depth."""
        if self.top == "vector":
            return (latent_dim,)
        coarsest = len(self.channels) - 1
        channels = sum(
            number * k * 4 ** (coarsest - level)
            for level, (number, k) in enumerate(zip(self.groups, self.latents, strict=True))
        )
        return (channels, *self.sizes(shape)[-1])

    def encoder(self, shape: tuple[int, int, int], latent_dim: int) -> Up:
        """x (n, *shape) -> what each level sees of the image."""
        return Up(self, shape, latent_dim)

    def decoder(self, latent_dim: int, shape: tuple[int, int, int]) -> Down:
        """z (n, d) of all groups -> parameters of p(x|z) (n, *shape)."""
        return Down(self, latent_dim, shape)

    def sizes(self, shape: tuple[int, int, int]) -> list[tuple[int, int]]:
        """Height and width of each level, finest first.

        Raises:
            ConfigError: Images of that shape have no such levels.
        """
        by = 2 ** len(self.channels)
        if self.top == "vector" and (shape[1] % by or shape[1] != shape[2]):
            raise ConfigError(
                f"a ladder of {len(self.channels)} levels takes square images that can be halved so many times, not "
                f'{shape[1]} x {shape[2]}; take fewer levels, or architecture = "conv"'
            )
        return [(shape[1] >> level, shape[2] >> level) for level in range(1, len(self.channels) + 1)]


class Seen(NamedTuple):
    """What the ladder sees of n images: features, finest level first, and q of the vector, if there is one."""

    levels: tuple[Tensor, ...]
    vector: DiagonalGaussian | None
    """mean and log_var, (n, latent_dim) each."""


class Up(nn.Module):
    """The way up: x -> features of each level, and q of the vector above the coarsest, if there is one."""

    def __init__(self, settings: Ladder, shape: tuple[int, int, int], latent_dim: int) -> None:
        super().__init__()
        widths = (shape[0], *settings.channels)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.levels = nn.ModuleList(
            nn.Sequential(*(Residual(width) for _ in range(settings.blocks))) for width in settings.channels
        )
        height, width = settings.sizes(shape)[-1]
        self.vector = (
            MlpEncoder(nn.Flatten(), settings.channels[-1] * height * width, latent_dim)
            if settings.top == "vector"
            else None
        )

    def forward(self, x: Tensor) -> Seen:
        """(n, c, h, w) -> its features."""
        found = []
        for down, level in zip(self.downs, self.levels, strict=True):
            x = functional.silu(level(down(x)))
            found.append(x)
        vector = None if self.vector is None else of_rows(*self.vector(x))
        return Seen(tuple(found), vector)


class Step(nn.Module):
    """One group of latents: q given the state above and the features, and the state below given its latents.

    The latents are standardised: z ~ N(0, I) enters the state times a standard deviation that the state gives. So q's
    mean and log_var are relative to the prior of the group, as NVAE's are (section 3.2 there).
    """

    def __init__(self, width: int, latents: int, dropout: float) -> None:
        super().__init__()
        self.seen = nn.Conv2d(width, width, 1)
        self.state = nn.Conv2d(width, width, 1)
        self.q = nn.Conv2d(width, 2 * latents, 1)
        self.log_std = nn.Conv2d(width, latents, 1)
        self.enter = nn.Conv2d(latents, width, 1)
        self.block = Residual(width, dropout)
        for conv in (self.q, self.log_std):
            nn.init.zeros_(conv.weight)
            nn.init.constant_(conv.bias, 0.0)  # type: ignore[arg-type]

    def posterior(self, active: Tensor, seen: Tensor, draws: int) -> Tensor:
        """Mean and log_var beside each other: active (draws n, c, h, w), seen (n, c, h, w) -> (draws n, 2 k, h, w)."""
        both = self.state(active).unflatten(0, (draws, -1)) + self.seen(seen)
        found: Tensor = self.q(functional.silu(both.flatten(0, 1)))
        return found

    def forward(self, state: Tensor, active: Tensor, z: Tensor) -> Tensor:
        """State and its activation (n, c, h, w), and z (n, k, h, w) -> the state below, (n, c, h, w)."""
        std = self.log_std(active).float().exp()
        found: Tensor = self.block(state + self.enter(z * std))
        return found


class Walk(NamedTuple):
    """A walk down the ladder: all latents with q's mean and log_var, packed, and parameters of p(x|z)."""

    z: Tensor
    mean: Tensor
    log_var: Tensor
    parameters: Tensor


class Down(nn.Module):
    """The way down: draws of q or given latents -> parameters of p(x|z).

    z holds the vector above the coarsest level, then the groups from coarse to fine, each flattened. Without the vector
    it is a tensor (c, h, w) of the coarsest level's height and width, and each group is packed into channels of it by
    space-to-depth.
    """

    def __init__(self, settings: Ladder, latent_dim: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.spatial = settings.top == "spatial"
        sizes = settings.sizes(shape)[::-1]
        widths, latents = settings.channels[::-1], settings.latents[::-1]
        groups = [
            (k, *size)
            for k, size, number in zip(latents, sizes, settings.groups[::-1], strict=True)
            for _ in range(number)
        ]
        self.group_shapes = groups if self.spatial else [(latent_dim, 1, 1), *groups]
        """Shape of each group, the vector first; for images of that shape."""
        self.blocks = [height // sizes[0][0] for _, height, _ in groups]
        """Side of the blocks that space-to-depth makes channels of, a number a group but the vector."""
        self.group_sizes = (
            [k * block**2 for (k, *_), block in zip(groups, self.blocks, strict=True)]
            if self.spatial
            else [math.prod(group) for group in self.group_shapes]
        )
        """Length of each group along the axis 1 of z."""
        first = (widths[0], *sizes[0])
        self.vector: nn.Module | None = None
        if self.spatial:
            self.start = nn.Parameter(torch.zeros(widths[0]))
        else:
            self.vector = nn.Sequential(nn.Linear(latent_dim, math.prod(first)), nn.Unflatten(1, first))
        self.levels = nn.ModuleList(
            nn.ModuleList(Step(width, k, settings.dropout) for _ in range(number))
            for width, k, number in zip(widths, latents, settings.groups[::-1], strict=True)
        )
        known = [None] * len(widths) if self.spatial else [*sizes[1:], shape[1:]]
        self.ups = nn.ModuleList(
            [Upsample(a, b, size, kernel=1) for (a, b), size in zip(pairwise(widths), known[:-1], strict=True)]
            + [Upsample(widths[-1], shape[0], known[-1])]
        )

    def forward(self, z: Tensor) -> Tensor:
        """(n, *latent_shape) -> (n, c, h, w)."""
        parts = iter(self.parts(z))
        state = self._first(z) if self.vector is None else self._first(next(parts))
        return self._down(state, lambda _step, _active, _level: next(parts))

    def parts(self, z: Tensor) -> list[Tensor]:
        """The vector (n, latent_dim), if there is one, and the groups (n, c, h, w) of z (n, *latent_shape)."""
        parts = z.split(self.group_sizes, 1)
        if self.spatial:
            return [functional.pixel_shuffle(part, block) for part, block in zip(parts, self.blocks, strict=True)]
        vector, *others = parts
        return [vector, *(part.unflatten(1, shape) for part, shape in zip(others, self.group_shapes[1:], strict=True))]

    def packed(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `parts`."""
        if not self.spatial:
            return torch.cat([part.flatten(1) for part in parts], 1)
        pairs = zip(parts, self.blocks, strict=True)
        return torch.cat([functional.pixel_unshuffle(part, block) for part, block in pairs], 1)

    def walk(self, seen: Seen, eps: Tensor) -> Walk:
        """Draw all groups from q, each given those above: seen of n images, eps (L, n, *latent_shape)."""
        draws, noise = eps.shape[0], self.parts(eps.flatten(0, 1))
        drawn: list[tuple[Tensor, Tensor, Tensor]] = []

        def kept(mean: Tensor, log_var: Tensor) -> Tensor:
            z = mean + torch.exp(0.5 * log_var) * noise[len(drawn)]
            drawn.append((z, mean, log_var))
            return z

        def draw(step: Step, active: Tensor, level: int) -> Tensor:
            return kept(*step.posterior(active, seen.levels[level], draws).float().chunk(2, 1))

        if seen.vector is None:
            state = self._first(noise[0])
        else:
            state = self._first(kept(*(part.repeat(draws, 1) for part in seen.vector)))
        parameters = self._down(state, draw)
        z, mean, log_var = (self.packed(parts) for parts in zip(*drawn, strict=True))
        return Walk(z, mean, log_var, parameters)

    def _first(self, z: Tensor) -> Tensor:
        """The state of the coarsest level: from the vector, or for latents of the coarsest level's height and width."""
        if self.vector is not None:
            found: Tensor = self.vector(z)
            return found.contiguous(memory_format=torch.channels_last)
        return self.start.view(1, -1, 1, 1).expand(z.shape[0], -1, *z.shape[2:])  # len would fix the number of rows

    def _down(self, state: Tensor, latents: Callable[[Step, Tensor, int], Tensor]) -> Tensor:
        """The way from the first state to p(x|z); `latents` gives those of a step from the active state and level."""
        coarsest = len(self.levels) - 1
        for index, (steps, up) in enumerate(zip(self.levels, self.ups, strict=True)):
            for step in steps:  # type: ignore[attr-defined]
                active = functional.silu(state)
                state = step(state, active, latents(step, active, coarsest - index))
            state = up(functional.silu(state))
        return state
