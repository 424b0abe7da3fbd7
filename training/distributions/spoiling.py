"""Random corruptions of photographs: white noise, what cameras and JPEG leave, missing pixels, and means of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from service.contract.corruption import NoiseName
from training.distributions.camera import compressed, luma, photographed
from training.strict import Strict

NAMES: tuple[NoiseName, ...] = ("gaussian", "processed")
"""Noise families of a conditional model, in the order of the level's columns."""
LEAST_PROCESSED = 0.5 / 255.0
"""Least root mean square of processed noise: half a grey level."""
ROUNDED = 0.15
"""Share of the noisy images that are rounded and cut to eight bits."""
JITTER = 0.15
"""Standard deviation of the logarithm of the told level of processed noise, which callers know roughly."""
GREY = 0.5
"""What stands where a pixel is missing."""
FACTORS = (2, 4)
"""Sides of blocks that are averaged."""

Share = Annotated[float, Field(ge=0, le=1)]
Quality = Annotated[int, Field(ge=1, le=100)]


class Corruptions(Strict):
    """Corruptions that training simulates. The first five are shares of the images, and add up to 1."""

    white: Share = 0.70
    """Gaussian noise."""
    camera: Share = 0.08
    """A camera: noise on a Bayer mosaic, demosaicing, white balance, gamma and JPEG of quality 85 to 95."""
    jpeg: Share = 0.08
    """JPEG of `qualities`."""
    missing: Share = 0.08
    """Missing pixels, scattered, as lines, as strokes or as blocks, half of them with Gaussian noise too."""
    shrunk: Share = 0.06
    """Means of blocks of 2 x 2 or 4 x 4 pixels."""
    qualities: tuple[Quality, Quality] = (10, 90)
    """Least and largest quality of JPEG."""
    most: Annotated[float, Field(gt=0, le=1)] = 75 / 255
    """Largest standard deviation of Gaussian noise."""
    weak: Annotated[float, Field(gt=0, le=1)] = 15 / 255
    """Three tenths of the standard deviations are below this one, the others uniform up to the largest."""

    @model_validator(mode="after")
    def _add_up(self) -> Corruptions:
        if self.qualities[0] > self.qualities[1]:
            raise ValueError("qualities holds the least quality of JPEG, then the largest")
        if abs(sum(self.shares.values()) - 1.0) > 1e-6:
            told = ", ".join(f"{name} = {share:g}" for name, share in self.shares.items())
            raise ValueError(f"the shares {told} add up to {sum(self.shares.values()):g}; they must add up to 1")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Share of the images by kind."""
        return {name: getattr(self, name) for name in ("white", "camera", "jpeg", "missing", "shrunk")}


class Spoilt(NamedTuple):
    """Clean images and what is seen of them.

    Attributes:
        x: (n, c, h, w), in [0, 1].
        y: Observed pixels, shaped like x.
        mask: 1 where a pixel is observed, 0 where it is missing, 1/k^2 where it is the mean of k x k pixels.
        level: Levels of the noise families `NAMES`, (n, 2).
    """

    x: Tensor
    y: Tensor
    mask: Tensor
    level: Tensor


class Chance(NamedTuple):
    """Sources of random numbers."""

    generator: torch.Generator
    rng: Generator

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(*shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """Draws of N(0, 1)."""
        return torch.randn(*shape, generator=self.generator)


def spoil(x: Tensor, channels: int, settings: Corruptions, generator: torch.Generator) -> Spoilt:
    """Corrupt images at random, on the CPU, each in one way.

    Args:
        x: (n, c, h, w) in [0, 1], c 1 or 3, height and width multiples of 4.
        channels: Channels of the images that are wanted: 1 makes colours grey, half of the times by luma, else by one
            of the channels.
        settings: Shares and levels.
        generator: Source of all random numbers.

    Returns:
        On the device of x.
    """
    device, seed = x.device, int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    chance = Chance(torch.Generator().manual_seed(seed), np.random.default_rng(seed))
    x = x.cpu()
    shares = settings.shares
    kinds = np.repeat(list(shares), chance.rng.multinomial(len(x), list(shares.values())))
    y, taken = x.clone(), torch.from_numpy(kinds == "camera")
    if taken.any():
        y[taken] = _taken(x[taken], chance)
    if channels == 1 and x.shape[1] == 3:
        x, y = _grey(x, y, chance)
    found = Spoilt(x, y, torch.ones_like(x), torch.zeros(len(x), len(NAMES)))
    for kind, spoilt in KINDS.items():
        rows = torch.from_numpy(kinds == kind)
        if rows.any():
            for whole, part in zip(found[1:], spoilt(x[rows], y[rows], settings, chance), strict=True):
                whole[rows] = part
    return Spoilt(*(part.to(device) for part in found))


Seen = tuple[Tensor, Tensor, Tensor]


def _white(x: Tensor, _y: Tensor, settings: Corruptions, chance: Chance) -> Seen:
    sigma = _sigma(len(x), settings, chance)
    return _noisy(x, sigma, chance), torch.ones_like(x), _level(sigma, 0)


def _missing(x: Tensor, _y: Tensor, settings: Corruptions, chance: Chance) -> Seen:
    sigma = _sigma(len(x), settings, chance) * (chance.uniform(len(x)) >= 0.5)
    holes = torch.from_numpy(np.stack([_hole(chance.rng, *x.shape[2:]) for _ in x]))[:, None].expand_as(x)
    return torch.where(holes, GREY, _noisy(x, sigma, chance)), (~holes).float(), _level(sigma, 0)


def _shrunk(x: Tensor, _y: Tensor, _settings: Corruptions, chance: Chance) -> Seen:
    factor = int(chance.rng.choice(FACTORS))
    small = functional.avg_pool2d(x, factor)
    y = functional.interpolate(small, scale_factor=float(factor), mode="nearest")
    return y, torch.full_like(x, 1.0 / factor**2), torch.zeros(len(x), len(NAMES))


def _compressed(x: Tensor, _y: Tensor, settings: Corruptions, chance: Chance) -> Seen:
    return _processed(x, compressed(x, chance.rng, *settings.qualities), settings, chance)


def _processed(x: Tensor, y: Tensor, _settings: Corruptions, chance: Chance) -> Seen:
    """What was seen, with a level that is known roughly."""
    level = (y - x).square().mean((1, 2, 3)).sqrt().clamp(min=LEAST_PROCESSED)
    return y, torch.ones_like(x), _level(level * torch.exp(JITTER * chance.normal(len(x))), 1)


KINDS: dict[str, Callable[[Tensor, Tensor, Corruptions, Chance], Seen]] = {
    "white": _white,
    "camera": _processed,
    "jpeg": _compressed,
    "missing": _missing,
    "shrunk": _shrunk,
}
"""What is seen of clean images x, by kind of corruption; y is x, or what the camera has made of it."""


def _taken(x: Tensor, chance: Chance) -> Tensor:
    """Pictures of a camera; grey scenes stay grey."""
    if x.shape[1] == 3:
        return photographed(x, *chance)
    return luma(photographed(x.expand(-1, 3, -1, -1), *chance))


def _grey(x: Tensor, y: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
    if chance.rng.random() < 0.5:
        return luma(x), luma(y)
    channel = int(chance.rng.integers(3))
    return x[:, channel, None].contiguous(), y[:, channel, None].contiguous()


def _sigma(count: int, settings: Corruptions, chance: Chance) -> Tensor:
    most = torch.where(chance.uniform(count) < 0.3, settings.weak, settings.most)
    return most * chance.uniform(count)


def _level(values: Tensor, column: int) -> Tensor:
    return functional.one_hot(torch.full((len(values),), column), len(NAMES)) * values[:, None]


def _noisy(x: Tensor, sigma: Tensor, chance: Chance) -> Tensor:
    """X with noise, some of it rounded and cut as an 8-bit file has it."""
    noisy = x + sigma[:, None, None, None] * chance.normal(*x.shape)
    rounded = (noisy * 255.0).round().clamp(0.0, 255.0) / 255.0
    return torch.where(chance.uniform(len(x), 1, 1, 1) < ROUNDED, rounded, noisy)


def _hole(rng: Generator, height: int, width: int) -> NDArray[np.bool_]:
    """Which pixels are missing, (h, w): scattered ones, lines, strokes as of letters, or blocks."""
    kind = rng.integers(4)
    if kind == 0:
        return np.asarray(rng.random((height, width)) < rng.uniform(0.1, 0.9))
    found = np.zeros((height, width), bool)
    if kind == 1:
        y, x = np.mgrid[:height, :width]
        for _ in range(rng.integers(2, 9)):
            angle, (left, top) = rng.uniform(0, np.pi), rng.uniform(0, (width, height))
            across = (x - left) * np.sin(angle) - (y - top) * np.cos(angle)
            along = (x - left) * np.cos(angle) + (y - top) * np.sin(angle)
            found |= (np.abs(across) < rng.uniform(0.6, 3)) & (np.abs(along) < rng.uniform(5, 40))
        return found
    strokes, sides = (rng.integers(10, 50), (1, 12)) if kind == 2 else (rng.integers(1, 3), (4, 25))
    for _ in range(strokes):
        top, left = rng.integers(0, height), rng.integers(0, width)
        down, right = rng.integers(*sides, 2)
        if kind == 2:  # thin, upright or level
            thin = rng.integers(1, 4)
            down, right = (max(4, down), thin) if rng.random() < 0.5 else (thin, max(4, right))
        found[top : top + down, left : left + right] = True
    return found
