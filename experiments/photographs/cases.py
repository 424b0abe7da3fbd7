"""What is done to an image before it is sent, and the truth of the answer."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from experiments.photographs import camera
from experiments.photographs.masks import MASKS
from experiments.photographs.sets import MICROGRAPHS, Picture
from service.contract.images import Pixels
from training.evaluation.tasks import Seen, Task

LEVELS = 255.0
TOLD_SIGMAS = (15.0, 25.0, 50.0)
INTERVAL_SIGMAS = (10.0, 25.0, 50.0)
AUTO_SIGMAS = (5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 60.0)
SENT_SIGMAS = (2.0, *AUTO_SIGMAS, 75.0)
"""Standard deviations of noise in 255ths: those of the literature, of intervals, of estimated levels, and all."""
ISOS = (400, 1600, 3200, 6400)
QUALITIES = (10, 20, 30, 40, 50, 70, 90)
FACTORS = (2, 4)
GREY = ("Set12", "BSD68")
COLOUR = ("CBSD68", "Kodak24", "McMaster")


class Spoilt(NamedTuple):
    """The truth and what is sent, one row each."""

    x: Pixels
    seen: Seen


@dataclass(frozen=True)
class Case:
    """One way to spoil an image.

    Attributes:
        task: Its name, the operation that restores it, and family and level of its noise. Without a family to
            denoise, 8 bits are sent as a picture file; else float32.
        spoil: Spoils a picture with a generator.
    """

    task: Task
    spoil: Callable[[Picture, np.random.Generator], Spoilt]

    @property
    def name(self) -> str:
        """Name of the case."""
        return self.task.name

    def spoilt(self, picture: Picture, seed: int) -> Spoilt:
        """Spoil a picture.

        Args:
            picture: The picture.
            seed: Seed, together with names of set, picture and case.

        Returns:
            The truth and what is sent, functions of the arguments alone.
        """
        words = (zlib.crc32(text.encode()) for text in (picture.place, self.name))
        return self.spoil(picture, np.random.default_rng([seed, *words]))


def gaussian(sigma: float) -> Case:
    """Additive Gaussian noise, not cut.

    Args:
        sigma: Its standard deviation in 255ths.
    """

    def spoil(picture: Picture, rng: np.random.Generator) -> Spoilt:
        noise = (sigma / LEVELS) * rng.standard_normal(picture.x.shape)
        return _row(picture.x, (picture.x + noise).astype(np.float32))

    return Case(Task(f"Gaussian {sigma:g}", "denoise", "gaussian", sigma / LEVELS), spoil)


def noiseless(name: str, change: Callable[[Pixels, np.random.Generator], Pixels] | None = None) -> Case:
    """A picture that is sent in 8 bits.

    Args:
        name: Name of the case.
        change: Changes the picture (c, h, w) that is sent and the truth; None changes nothing.
    """

    def spoil(picture: Picture, rng: np.random.Generator) -> Spoilt:
        x = picture.x if change is None else change(picture.x, rng)
        return _row(x, x)

    return Case(Task(name, "denoise"), spoil)


def degraded(name: str, change: Callable[[Pixels, np.random.Generator], Pixels]) -> Case:
    """A picture that loses quality on the way and is sent in 8 bits.

    Args:
        name: Name of the case.
        change: Makes what is sent of the picture (c, h, w).
    """
    return Case(Task(name, "denoise"), lambda picture, rng: _row(picture.x, change(picture.x, rng)))


def masked(name: str) -> Case:
    """Missing pixels of one of `MASKS`; the others are exact."""

    def spoil(picture: Picture, rng: np.random.Generator) -> Spoilt:
        height, width = picture.x.shape[1:]
        known = ~MASKS[name](height, width, rng)
        mask = np.broadcast_to(known, picture.x.shape).astype(np.float32)
        return Spoilt(picture.x[None], Seen((picture.x * mask)[None], mask[None]))

    return Case(Task(name, "inpaint"), spoil)


def shrunk(factor: int) -> Case:
    """Means of blocks of factor x factor pixels. The picture is cut to whole blocks."""

    def spoil(picture: Picture, _rng: np.random.Generator) -> Spoilt:
        channels, height, width = picture.x.shape
        x = picture.x[:, : height - height % factor, : width - width % factor]
        blocks = x.reshape(channels, height // factor, factor, width // factor, factor)
        return _row(x, blocks.mean((2, 4), dtype=np.float64).astype(np.float32))

    return Case(Task(f"x{factor}", "super-resolve", factor=factor), spoil)


def _row(x: Pixels, y: Pixels) -> Spoilt:
    return Spoilt(x[None], Seen(y[None], None))


def _taken(picture: Picture, _rng: np.random.Generator) -> Spoilt:
    assert picture.y is not None
    return _row(picture.x, picture.y)


def _stored(quality: int, x: Pixels, _rng: np.random.Generator) -> Pixels:
    return camera.jpeg(x, quality)


def _photographed(iso: int, x: Pixels, rng: np.random.Generator) -> Pixels:
    return camera.photographed(x, iso, rng)


CLEAN, INVERTED, RESTORED = "clean", "inverted", "already restored"
KEPT = {CLEAN: noiseless(CLEAN), INVERTED: noiseless(INVERTED, lambda x, _: (1.0 - x).astype(np.float32))}
CAMERA = tuple(degraded(f"ISO {iso}", partial(_photographed, iso)) for iso in ISOS)
JPEG = tuple(degraded(f"JPEG {quality}", partial(_stored, quality)) for quality in QUALITIES)
MISSING = tuple(masked(name) for name in MASKS)
SHRUNK = tuple(shrunk(factor) for factor in FACTORS)
FRAME = Case(Task("single frame", "denoise"), _taken)
AGAIN = Case(Task(RESTORED, "denoise"), gaussian(25.0).spoil)
"""A picture with noise of 25 that is restored, and whose restoration is sent in 8 bits."""


@dataclass(frozen=True)
class Measurement:
    """Cases that answer one question.

    Attributes:
        sets: Sets on which they are measured.
        cases: The cases.
        methods: Names of the methods.
    """

    sets: tuple[str, ...]
    cases: tuple[Case, ...]
    methods: tuple[str, ...]


def noise(sigmas: Iterable[float]) -> tuple[Case, ...]:
    """Cases of Gaussian noise."""
    return tuple(map(gaussian, sigmas))


def measurements(sigmas: Iterable[float] = ()) -> dict[str, Measurement]:
    """Everything that can be measured, by name.

    Args:
        sigmas: Standard deviations of the noise of `noise` and `draws` in 255ths, in place of their own.
    """
    photographs, asked = (*GREY, *COLOUR), tuple(sigmas)
    told, drawn = noise(asked or TOLD_SIGMAS), noise(asked or INTERVAL_SIGMAS)
    return {
        "noise": Measurement(photographs, told, ("as sent", "total variation", "non-local means", "BM3D", "ours")),
        "draws": Measurement(photographs, drawn, ("ours draws",)),
        "auto": Measurement(photographs, noise(SENT_SIGMAS), ("as sent", "ours", "ours auto")),
        "kept": Measurement(photographs, (*KEPT.values(), AGAIN), ("ours auto",)),
        "camera": Measurement(("CBSD68",), CAMERA, ("as sent", "ours auto")),
        "jpeg": Measurement(("CBSD68",), JPEG, ("as sent", "ours auto")),
        "missing": Measurement(GREY, MISSING, ("biharmonic", "ours")),
        "shrunk": Measurement(GREY, SHRUNK, ("bicubic", "ours")),
        "refined": Measurement(GREY, (*told, *MISSING, *SHRUNK), ("ours refined",)),
        "micrographs": Measurement((MICROGRAPHS,), (FRAME,), ("as sent", "ours auto")),
    }
