"""Noisy images of which no clean version exists: crops, each with the noise of its image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from service.contract.images import DECODER_ERRORS, draw, upright
from training.data.crops import LEAST, LEAST_HELD_OUT, Crops, Levels, Visits
from training.data.folder import SEQUENCES, files_below, opened, reason_of
from training.data.images import DatasetSettings, ImageSet, Share, split_off
from training.distributions.interface import LEVELS, Support
from training.distributions.likelihoods.noise import Camera
from training.distributions.poisson_gaussian import PoissonGaussian, estimated
from training.errors import DataError
from training.progress import tell
from training.strict import Positive

LEAST_FILES = 3  # one a split
PLANES = 3
"""Of a crop: pixels, gain, offset."""


class Plane(NamedTuple):
    """One channel of one frame."""

    levels: NDArray[np.generic]
    """(h, w), in the type of the file."""
    white: float
    """Level that stands for 1."""
    noise: Camera

    def values(self, part: tuple[slice, slice]) -> NDArray[np.float32]:
        """A part of it in units of white."""
        return np.divide(self.levels[part], self.white, dtype=np.float32)


class Noisy(DatasetSettings):
    """Every picture and stack below the directory, in 8 or 16 bits or floating point, as crops.

    Every channel and every page is a grey image of its own. All are kept in memory, in the type of their files. Files
    are read as those of `dataset = "folder"`.
    """

    support: ClassVar[Support] = Support.REAL
    dataset: Literal["noisy"]
    """Noisy pictures below `--data`; no clean ones are needed."""
    size: Positive = 64
    """Height and width of a crop."""
    per_epoch: Positive = 1024
    """Crops of an epoch, at random places, mirrored and turned by multiples of 90 degrees."""
    frames: Literal["first", "all"] = "all"
    """Of each file the first page, or all of them."""
    bits: Annotated[int, Field(ge=1, le=16)] = 16
    """16-bit levels are divided by 2^bits - 1."""
    validation: Share = 0.05
    """Share of the files for validation, of those that are not for testing."""
    test: Share = 0.05
    """Share of all files for testing."""
    seed: int = 0
    """Seed of the splits."""

    def load(self, root: Path, noise: Camera | None = None) -> ImageSet:
        """Load the three splits, of crops (3, size, size) in float32: pixels, and their image's gain and offset.

        Args:
            root: The directory.
            noise: That of every image; None finds it in each.

        Raises:
            DataError: The directory is missing, or has too few images or unreadable ones; one message names them all.
        """
        if not root.is_dir():
            raise DataError(f"{root} is not a directory; --data must name a directory of noisy images")
        bad: list[str] = []
        files: list[list[Plane]] = []
        found = files_below(root, lambda path, reason: bad.append(f"{path} ({reason})"))
        for path in tqdm(found, desc="reading images", unit="file", leave=False):
            try:
                planes = [self._plane(*part, noise) for part in self.planes(path)]
            except DataError as error:
                bad.append(f"{path} ({error})")
                continue
            if planes:
                files.append(planes)
        if bad:
            raise DataError(f"cannot read {'; '.join(bad)}; replace or remove them")
        if len(files) < LEAST_FILES:
            raise DataError(f"{root} holds {len(files)} files with images; at least {LEAST_FILES} are needed")
        self._report(files, noise)
        return self._split(files)

    def planes(self, path: Path) -> Iterator[tuple[NDArray[np.generic], float]]:
        """Channels of the frames of one file, (h, w) each, with the level that stands for 1; none where it is no image.

        Raises:
            DataError: It cannot be read; the message is the reason alone.
        """
        file = opened(path)
        if file is None:
            return
        try:
            with file:
                count = getattr(file, "n_frames", 1) if self.frames == "all" and file.format in SEQUENCES else 1
                for frame in range(count):
                    file.seek(frame)
                    yield from self._channels(upright(file))
        except DECODER_ERRORS as error:
            raise DataError(reason_of(error)) from error

    def _channels(self, image: Image.Image) -> Iterator[tuple[NDArray[np.generic], float]]:
        if image.mode == "F":
            yield np.asarray(image), 1.0
            return
        if image.mode.startswith("I;16"):
            yield np.asarray(image), 2.0**self.bits - 1.0
            return
        colour = image.mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr")
        levels = np.empty((3 if colour else 1, image.height, image.width), np.uint8)
        draw(image, levels)
        for plane in levels:
            yield plane, LEVELS - 1.0

    def _plane(self, levels: NDArray[np.generic], white: float, noise: Camera | None) -> Plane:
        if min(levels.shape) < self.size:
            height, width = levels.shape
            raise DataError(f"its {height} x {width} pixels hold no crop of {self.size} x {self.size}")
        if noise is None:
            y = torch.from_numpy(np.divide(levels, white, dtype=np.float32))[None, None]
            found = estimated(y, torch.ones_like(y))
            noise = Camera(gain=float(found.gain), offset=float(found.offset))
        return Plane(levels, white, noise)

    def _report(self, files: list[list[Plane]], noise: Camera | None) -> None:
        planes = [plane for file in files for plane in file]
        gain, offset = (float(np.median([getattr(p.noise, key) for p in planes])) for key in ("gain", "offset"))
        how = "found blindly, median" if noise is None else "as given"
        tell(
            f"read {len(planes)} noisy images of {len(files)} files; noise {how}: gain {gain:.3g}, offset {offset:.3g}"
        )

    def _split(self, files: list[list[Plane]]) -> ImageSet:
        """Crops of the images of each split; those held out stay the same."""
        rest, test = split_off(torch.arange(len(files)), self.test, self.seed)
        parts = (*split_off(rest, self.validation, self.seed), test)
        shares = (1.0, self.validation, self.test)
        train, *held_out = (
            Crops(
                Visits(
                    NoisyPictures([plane for row in rows.tolist() for plane in files[row]], self.size),
                    math.ceil(share * self.per_epoch),
                    least,
                    (self.seed, split),
                ),
                0,  # images are in memory: no need for other processes
                skip=False,
            )
            for split, (rows, share, least) in enumerate(
                zip(parts, shares, (LEAST, LEAST_HELD_OUT, LEAST_HELD_OUT), strict=True)
            )
        )
        validation, test_crops = (crops.first() for crops in held_out)
        return ImageSet(train.first(), validation, test_crops, crops=train)


@dataclass(frozen=True)
class NoisyPictures:
    """Noisy images in memory, of which crops are cut.

    Attributes:
        planes: The images.
        size: Height and width of a crop.
    """

    planes: list[Plane]
    size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a crop."""
        return PLANES, self.size, self.size

    @property
    def dtype(self) -> torch.dtype:
        """Of a pixel."""
        return torch.float32

    def __len__(self) -> int:
        """Their number."""
        return len(self.planes)

    def crops(self, place: int, count: int, rng: Generator) -> Levels:
        """Cut crops of one image, (count, 3, size, size)."""
        plane = self.planes[place]
        found = np.empty((count, *self.shape), np.float32)
        found[:, 1], found[:, 2] = plane.noise.gain, plane.noise.offset
        for crop in found:
            top, left = (int(rng.integers(side - self.size + 1)) for side in plane.levels.shape)
            part = plane.values((slice(top, top + self.size), slice(left, left + self.size)))
            part = part[:, ::-1] if rng.random() < 0.5 else part
            crop[0] = np.rot90(part, int(rng.integers(4)))
        return found


def unpacked(images: Tensor) -> tuple[Tensor, PoissonGaussian]:
    """Pixels (n, 1, h, w) and noise of the crops (n, 3, h, w)."""
    gain, offset = images[:, 1:2, :1, :1], images[:, 2:3, :1, :1]
    return images[:, :1], PoissonGaussian(gain, offset)
