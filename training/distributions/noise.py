"""Noise families: for each its simulation and its observation likelihood, and both for all families together.

To add one: name it in `NoiseFamily` of service/contract/corruption.py, which makes it a column of the level, an option
of the service and a setting of the trainer; write its class here and list it in `ADDITIVE` or
`REPLACING`. Models trained from then on know it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import reduce
from operator import add, mul
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from service.contract.corruption import FAMILIES, NoiseFamily


class Noise(ABC):
    """A noise family with one parameter, the level in (0, 1], each image's own.

    Levels come as (n, 1, 1, 1) and images as (n, c, h, w). Level 0 is no noise.
    """

    name: ClassVar[NoiseFamily]
    low: ClassVar[float]
    """Lowest level that training simulates."""
    high: ClassVar[float]
    """Highest level that training simulates."""
    odds: ClassVar[float]
    """Weight of the family among those that training simulates."""
    checked: ClassVar[tuple[float, ...]]
    """Levels at which a trained model is evaluated."""

    @abstractmethod
    def drawn(self, u: Tensor) -> Tensor:
        """Levels from uniform numbers in [0, 1)."""

    @abstractmethod
    def corrupt(self, x: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
        """Draw y given x."""

    @property
    def column(self) -> int:
        """Column of the level (n, F)."""
        return FAMILIES.index(self.name)

    def of(self, level: Tensor) -> Tensor:
        """This family's level (n, 1, 1, 1) out of all families' (n, F)."""
        return level[:, self.column, None, None, None]


class Additive(Noise):
    """Noise around the pixel, whose likelihood is a Gaussian with the pixel as its mean. The level is a scale."""

    def drawn(self, u: Tensor) -> Tensor:
        """Log-uniform levels."""
        return self.low * (self.high / self.low) ** u

    @abstractmethod
    def variance(self, level: Tensor, at: Tensor | float) -> Tensor:
        """Var[y given x] where x is `at`."""


class Replacing(Noise):
    """Noise that sets a share of the pixels, the level, to 0 or 1 and leaves the others as they are."""

    black: ClassVar[float]
    """P(0 given that the pixel is replaced)."""
    white: ClassVar[float]
    """P(1 given that the pixel is replaced)."""

    def drawn(self, u: Tensor) -> Tensor:
        """Uniform levels."""
        return self.low + (self.high - self.low) * u


class Gaussian(Additive):
    """Gaussian noise; the level is its standard deviation."""

    name, low, high, odds = "gaussian", 0.015, 0.8, 0.58
    checked = (0.02, 0.05, 0.1, 0.25, 0.5, 0.6)

    def corrupt(self, x: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
        """X and noise."""
        return x + level * torch.randn(x.shape, generator=generator, device=x.device)

    def variance(self, level: Tensor, at: Tensor | float) -> Tensor:  # noqa: ARG002  # the same everywhere
        """level^2."""
        return level.square()


class Poisson(Additive):
    """Counts of mean x / level^2, times level^2; the level is the standard deviation at a pixel of 1."""

    name, low, high, odds = "poisson", 0.015, 0.8, 0.10
    checked = (0.1, 0.3)

    def corrupt(self, x: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
        """Scaled counts."""
        counts = torch.where(level > 0.0, x.clamp(min=0.0) / level.square().clamp(min=1e-12), 0.0)
        return torch.where(level > 0.0, torch.poisson(counts, generator) * level.square(), x)

    def variance(self, level: Tensor, at: Tensor | float) -> Tensor:
        """level^2 x."""
        return level.square() * at


class SaltAndPepper(Replacing):
    """Pixels set to 0 or 1, as often to either.

    Source: Vincent et al. (2010), section 3.3.
    """

    name, low, high, odds = "salt-and-pepper", 0.02, 0.6, 0.12
    checked, black, white = (0.1, 0.3), 0.5, 0.5

    def corrupt(self, x: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
        """X with a share replaced."""
        u = torch.rand(x.shape, generator=generator, device=x.device)
        return torch.where(u < level, (u < 0.5 * level).to(x.dtype), x)


class Masking(Replacing):
    """Pixels set to 0.

    Source: Vincent et al. (2010), section 3.3.
    """

    name, low, high, odds = "masking", 0.05, 0.9, 0.10
    checked, black, white = (0.25, 0.5), 1.0, 0.0

    def corrupt(self, x: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
        """X with a share blackened."""
        return x * (torch.rand(x.shape, generator=generator, device=x.device) >= level)


ADDITIVE: tuple[Additive, ...] = (Poisson(), Gaussian())
"""In the order in which they act."""
REPLACING: tuple[Replacing, ...] = (SaltAndPepper(), Masking())
"""In the order in which they act, after additive noise."""
NOISE: tuple[Noise, ...] = tuple(sorted((*ADDITIVE, *REPLACING), key=lambda noise: noise.column))
"""All families in the order of the level's columns."""


def corrupt(x: Tensor, level: Tensor, generator: torch.Generator, clip: Tensor | None = None) -> Tensor:
    """Draw y given x and the level of every family.

    Args:
        x: Images (n, c, h, w).
        level: (n, F), 0 where a family is absent.
        generator: Source of the noise.
        clip: (n, 1, 1, 1), whether additive noise is cut to [0, 1], as in an 8-bit image.
    """
    y = x
    for noise in ADDITIVE:
        y = noise.corrupt(y, noise.of(level), generator)
    if clip is not None:
        y = torch.where(clip, y.clamp(0.0, 1.0), y)
    for replacing in REPLACING:
        y = replacing.corrupt(y, replacing.of(level), generator)
    return y


def noise_variance(level: Tensor, at: Tensor | float) -> Tensor:
    """Variance of all additive noise at pixels of value `at`: (n, 1, 1, 1), or shaped like them."""
    return reduce(add, (noise.variance(noise.of(level), at) for noise in ADDITIVE))


class Replacement(NamedTuple):
    """Probabilities of what replacing noise does to a pixel, (n, 1, 1, 1) each.

    Attributes:
        at_work: Whether there is any.
        kept: P(the pixel stays).
        black: P(the pixel becomes 0), a term for each family that does this.
        white: P(the pixel becomes 1) likewise.
    """

    at_work: Tensor
    kept: Tensor
    black: list[Tensor]
    white: list[Tensor]


def replacement(level: Tensor) -> Replacement:
    """The probabilities for level (n, F)."""
    shares = [noise.of(level) for noise in REPLACING]
    kept = reduce(mul, (1.0 - share for share in shares))
    replaced: list[Tensor] = []
    for share in shares:  # what a later family replaces is no longer as the earlier one left it
        replaced = [*(part * (1.0 - share) for part in replaced), share]
    black, white = (
        [odds * part for odds, part in zip(chances, replaced, strict=True) if odds]
        for chances in ([noise.black for noise in REPLACING], [noise.white for noise in REPLACING])
    )
    return Replacement(reduce(add, shares) > 0.0, kept, black, white)


def moved(level: Tensor, by: Tensor) -> Tensor:
    """The level (n, F) moved on its unbounded scale: the logarithm of a scale, the logit of a share."""
    scale = level * by.exp()
    share = scale / (1.0 - level + scale)
    parts = [(scale if isinstance(noise, Additive) else share)[:, k : k + 1] for k, noise in enumerate(NOISE)]
    return torch.cat(parts, 1)
