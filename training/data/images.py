"""Images in memory: one uint8 tensor a split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from training.data.crops import Crops
from training.distributions.interface import Support
from training.errors import DataError
from training.strict import Strict

Share = Annotated[float, Field(gt=0, lt=1)]
"""Share of a data set in a split."""


class DatasetSettings(Strict):
    """A data set; its `load(root)` reads the three splits of an `ImageSet` from the folder `--data`."""

    support: ClassVar[Support] = Support.EIGHT_BIT
    """Values of a pixel in [0, 1]."""
    stochastic: ClassVar[bool] = False
    """Whether a grey level is the probability that the pixel is white, as for handwritten digits."""
    about: ClassVar[str] = ""
    """What the images are and where they come from, for model cards; empty where only the user knows."""
    licence: ClassVar[str] = ""
    """Their licence likewise."""


@dataclass(frozen=True)
class ImageSet:
    """Three splits of one data set, each (n, c, h, w) in uint8, where 255 stands for 1, or in float32."""

    train: Tensor
    validation: Tensor
    test: Tensor
    crops: Crops | None = field(default=None, kw_only=True)
    """Replaces the training images by others in every epoch; None where they stay."""

    def __post_init__(self) -> None:
        for split in (self.train, self.validation, self.test):
            if split.dtype not in (torch.uint8, torch.float32) or split.ndim != 4 or len(split) == 0:
                raise DataError(
                    f"a split must be uint8 or float32 (n, c, h, w) with n > 0, not {split.dtype} {tuple(split.shape)}"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one image."""
        _, channels, height, width = self.train.shape
        return channels, height, width

    def to(self, device: torch.device) -> ImageSet:
        """The same images on a device."""
        return ImageSet(*(split.to(device) for split in (self.train, self.validation, self.test)), crops=self.crops)


def to_uint8(values: NDArray[np.floating], source: str) -> NDArray[np.uint8]:
    """Convert grey levels in [0, 1] to 0..255.

    Raises:
        DataError: A value is outside [0, 1] or not a number; the message names `source`.
    """
    low, high = values.min(), values.max()
    if not (low >= 0.0 and high <= 1.0):
        raise DataError(f"{source} has values from {low:g} to {high:g}; they must lie in [0, 1], so rescale them first")
    return np.rint(values * 255.0).astype(np.uint8)


def split_off(images: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split off a seeded random part of at least one image: (rest, part), each in the order of the file."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    size = max(1, round(fraction * len(images)))
    part, rest = order[:size].sort().values, order[size:].sort().values
    return images[rest], images[part]


def as_float(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in [0, 1]; float32 stays as it is."""
    return images.float() / 255.0 if images.dtype == torch.uint8 else images


def binarise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw Bernoulli(images / 255) for every pixel, exactly: P(r < x) = x / 255 for r uniform on 0..254."""
    r = torch.empty_like(images).random_(0, 255, generator=generator)
    return (r < images).float()
