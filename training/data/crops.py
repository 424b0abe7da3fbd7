"""Random crops of pictures, cut by worker processes an epoch ahead of the training."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from service.contract.cores import cpu_count
from training.errors import DataError
from training.progress import tell
from training.strict import Positive, Strict

Levels = NDArray[Any]
"""An image (c, h, w), in uint8 or, where noise is its subject, float32."""
LEAST, LEAST_HELD_OUT = 8, 2
"""Crops that a picture gives at least each time it is opened, because opening it costs more than a crop. Of pictures
that are held out fewer, because a figure is the surer the more pictures it is of."""
MOST_WORKERS = 8
MOST_TRIES = 20
"""Pictures in a row that cannot be read before a run stops."""
SHOWN_S = 2.0
"""Time after which a wait for crops is shown."""


class CropSettings(Strict):
    """Crops of `height` x `width` at a random place and scale, others in every epoch."""

    per_epoch: Positive = 4096
    """Crops of an epoch, of as many pictures as possible. Twice as many are in memory, whatever the size of the
    folder."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0, 0.75, 0.55, 0.4)
    """Each crop is of the picture at one of these scales, shrunk by means of areas."""
    flips: bool = True
    """Whether half of the crops are mirrored, left to right."""
    rotations: bool = False
    """Whether crops are turned by multiples of 90 degrees, which needs `height` = `width`."""
    candidates: Positive = 1
    """Of so many crops the one with the largest differences between neighbouring pixels is taken. 2 trains restoration
    0.2 dB better than 1, because sky and walls teach little."""

    def usable(self, size: tuple[int, int], picture: tuple[int, int]) -> list[float]:
        """The scales at which a picture holds a crop: `size` and `picture` are heights and widths."""
        return [scale for scale in self.scales if all(a <= b * scale for a, b in zip(size, picture, strict=True))]

    def cut(self, picture: Picture, size: tuple[int, int], rng: Generator) -> Levels:
        """Cut one crop.

        Args:
            picture: The picture, which holds a crop at one scale at least.
            size: Height and width of the crop.
            rng: Source of place, scale and orientation.

        Returns:
            (c, *size).
        """
        crop = max((self._candidate(picture, size, rng) for _ in range(self.candidates)), key=roughness)
        if self.flips and rng.random() < 0.5:
            crop = crop[..., ::-1]
        return np.ascontiguousarray(np.rot90(crop, int(rng.integers(4)), (1, 2)) if self.rotations else crop)

    def _candidate(self, picture: Picture, size: tuple[int, int], rng: Generator) -> Levels:
        scale = rng.choice(self.usable(size, picture.size))
        height, width = (side / scale for side in size)
        top, left = (
            int(rng.integers(whole - math.ceil(side) + 1))
            for whole, side in zip(picture.size, (height, width), strict=True)
        )
        planes = picture.levels((left, top, left + math.ceil(width), top + math.ceil(height)))
        within, box = (0.0, 0.0, width, height), Image.Resampling.BOX  # a pixel is the mean of its area
        return np.stack([np.asarray(Image.fromarray(plane).resize(size[::-1], box, within)) for plane in planes])


class Picture(NamedTuple):
    """One opened picture."""

    size: tuple[int, int]
    """Height and width."""
    levels: Callable[[tuple[int, int, int, int]], Levels]
    """Gives the pixels within a box (left, top, right, bottom)."""


def roughness(image: Levels) -> float:
    """Mean absolute difference between neighbouring pixels of an image (c, h, w)."""
    values = image.astype(np.int16)
    return float(np.abs(np.diff(values, axis=1)).mean() + np.abs(np.diff(values, axis=2)).mean())


class Pictures(Protocol):
    """A list of pictures that worker processes open."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a crop."""

    @property
    def dtype(self) -> torch.dtype:
        """Of a pixel."""

    def __len__(self) -> int:
        """Their number."""

    def crops(self, place: int, count: int, rng: Generator) -> Levels:
        """Cut crops of the picture at a place in the list, (count, c, h, w).

        Raises:
            DataError: It cannot be read. The message names it, with the reason.
        """


class Cut(NamedTuple):
    """What one opened picture gave."""

    crops: Levels
    """(k, c, h, w)."""
    bad: list[str]
    """Pictures that could not be read, with their reasons; another took their place."""


@dataclass(frozen=True)
class Visits(Dataset[Cut]):
    """Pictures in an endless random order, every picture once before any comes again, and the crops of each visit.

    All are a function of the seed and the visit's number.

    Attributes:
        pictures: The pictures.
        count: Crops of an epoch.
        least: Crops that a picture gives at least each time it is opened.
        key: The seed, with numbers that tell apart what shares it.
    """

    pictures: Pictures
    count: int
    least: int
    key: tuple[int, ...]

    @property
    def each(self) -> int:
        """Crops of a visit: more than the least where the pictures are few, so that an epoch opens each but once."""
        return max(min(self.least, self.count), -(-self.count // len(self.pictures)))

    @property
    def of_epoch(self) -> int:
        """Visits of an epoch."""
        return -(-self.count // self.each)

    def __getitem__(self, visit: int) -> Cut:
        """Cut the crops of a visit; of the next picture in the order where one cannot be read."""
        rng = np.random.default_rng((*self.key, 1, visit))
        wanted = min(self.each, self.count - self.each * (visit % self.of_epoch))
        bad: list[str] = []
        for place in range(visit, visit + min(MOST_TRIES, len(self.pictures))):
            try:
                return Cut(self.pictures.crops(self._picture(place), wanted, rng), bad)
            except DataError as error:
                bad.append(str(error))
        return Cut(np.empty((0,), np.uint8), bad)

    def _picture(self, place: int) -> int:
        turn, place = divmod(place, len(self.pictures))
        return int(_order(len(self.pictures), (*self.key, 0, turn))[place])


@lru_cache(maxsize=2)
def _order(count: int, key: tuple[int, ...]) -> NDArray[Any]:
    return np.random.default_rng(key).permutation(count)


class Crops:
    """The crops of each epoch, a function of seed and epoch, whatever the number of workers.

    Args:
        visits: The pictures and how they are cut.
        workers: Processes that cut; 0 cuts in this one.
        skip: Whether pictures that cannot be read are left out, with a message, or stop the run.

    Attributes:
        epoch: That of the crops in memory; None before the first.
    """

    def __init__(self, visits: Visits, workers: int, *, skip: bool) -> None:
        self.visits, self.skip = visits, skip
        self.workers = min(workers, cpu_count(), MOST_WORKERS, visits.of_epoch)
        self.epoch: int | None = None
        self._ahead: tuple[int, Iterator[Cut]] | None = None
        self._told: set[str] = set()

    def first(self) -> Tensor:
        """Cut the crops of the first epoch, (n, c, h, w)."""
        pictures = self.visits.pictures
        images = torch.empty((self.visits.count, *pictures.shape), dtype=pictures.dtype)
        self.fill(images, 0)
        return images

    def fill(
        self,
        images: Tensor,
        epoch: int,
        *,
        ahead: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Replace images by the crops of an epoch, if they are those of another.

        Args:
            images: (n, c, h, w), always the same tensor or a copy of it.
            epoch: The epoch, from 0.
            ahead: Whether the workers begin with the next epoch.
            interrupted: Whether to give up.

        Raises:
            DataError: A picture cannot be read, or a worker has ended.
            KeyboardInterrupt: `interrupted` returned True.
        """
        if self.epoch != epoch:
            known, cuts = self._ahead or (None, None)
            self._ahead = self.epoch = None
            self._collect(images, cuts if cuts is not None and known == epoch else self._cuts(epoch), interrupted)
            self.epoch = epoch
        if ahead and self._ahead is None and self.workers:
            self._ahead = epoch + 1, self._cuts(epoch + 1)

    def close(self) -> None:
        """End the workers."""
        self._ahead = None

    def _collect(self, images: Tensor, cuts: Iterator[Cut], interrupted: Callable[[], bool]) -> None:
        """Copy the crops of an epoch into `images`."""
        done = 0
        bar = tqdm(total=self.visits.of_epoch, desc="opening pictures", unit="picture", leave=False, delay=SHOWN_S)
        try:
            with bar:
                for cut in cuts:
                    self._report(cut)
                    images[done : done + len(cut.crops)].copy_(torch.from_numpy(cut.crops))
                    done += len(cut.crops)
                    bar.update()
                    if interrupted():
                        raise KeyboardInterrupt
        except RuntimeError as error:  # of the loader, whose worker was killed
            raise DataError(
                f"a process that opens pictures has ended ({error}); if memory was short, use fewer --threads"
            ) from error

    def _report(self, cut: Cut) -> None:
        for bad in cut.bad:
            if not self.skip:
                raise DataError(f'{bad} cannot be read; replace or remove it, or set on_error = "skip" in [data]')
            if bad not in self._told:
                self._told.add(bad)
                tell(f"left out {bad}")
        if not len(cut.crops):
            raise DataError(f"{len(cut.bad)} pictures in a row cannot be read, the last one {cut.bad[-1]}")

    def _cuts(self, epoch: int) -> Iterator[Cut]:
        """Begin to cut the crops of an epoch. The workers hold them all until they are taken."""
        size = self.visits.of_epoch
        loader = DataLoader(
            self.visits,
            batch_size=None,
            sampler=range(epoch * size, (epoch + 1) * size),
            num_workers=self.workers,
            prefetch_factor=-(-size // self.workers) if self.workers else None,
            collate_fn=_unchanged,
            worker_init_fn=_begin if self.workers else None,
            generator=torch.Generator(),  # otherwise the loader draws a number of the global one
        )
        return iter(loader)


def _unchanged(cut: Any) -> Any:
    """The cut as it is: arrays pass through a pipe, where tensors would need shared memory, short in containers."""
    return cut


def _begin(_worker: int) -> None:
    """Leave Ctrl-C to the first process, and end at SIGTERM, whatever handlers that one has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
