"""Photon transfer: the noise of a camera from frames of static scenes, for `python -m training noise-model`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.data.noisy import Noisy
from training.errors import DataError, DiskError

BINS = 64
"""Groups of pixels of about equal signal."""
LEAST_FRAMES = 2
CLIPPED = 1e-9
ROUNDS = 20


class Curve(NamedTuple):
    """Mean and variance over the frames of groups of pixels, (k,) each, and the number of pixels in each."""

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    pixels: NDArray[np.float64]


class Fitted(NamedTuple):
    """The line Var[y|s] = gain s + offset, in which white is 1, and the frames and scenes that it was fitted to."""

    gain: float
    offset: float
    frames: int
    scenes: int


def scenes_of(calibration: Path) -> list[Path]:
    """The scenes of a calibration: each folder in it, such as dark/ and flat-1/; or one, the folder or stack itself.

    Raises:
        DataError: There is nothing there.
    """
    if not calibration.exists():
        raise DataError(f"{calibration} does not exist; name a folder of frames, or one stack")
    folders = sorted(path for path in calibration.iterdir() if path.is_dir()) if calibration.is_dir() else []
    return folders or [calibration]


def frames_of(scene: Path, bits: int) -> NDArray[np.float32]:
    """All frames of a scene, (k, h, w), in units of white.

    Raises:
        DataError: They are fewer than two, or of different sizes.
    """
    reader = Noisy(dataset="noisy", size=1, bits=bits)
    files = [scene] if scene.is_file() else sorted(path for path in scene.iterdir() if path.is_file())
    frames = [np.divide(levels, white, dtype=np.float32) for file in files for levels, white in reader.planes(file)]
    if len(frames) < LEAST_FRAMES:
        raise DataError(f"{scene} holds {len(frames)} frames; the noise shows in two at least of the same scene")
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{scene} holds frames of different sizes; keep those of one scene in a folder of their own")
    return np.stack(frames)


def curve_of(frames: NDArray[np.float32]) -> Curve:
    """Means and variances over time of the pixels of one scene, (k, h, w), in groups of about equal mean.

    Changes of brightness from frame to frame are taken out. Pixels that are ever black or white are left out.
    """
    whole = frames.astype(np.float64)
    level = whole.mean((1, 2), keepdims=True)
    whole *= level.mean() / np.maximum(level, 1e-12)
    mean, variance = whole.mean(0).ravel(), whole.var(0, ddof=1).ravel()
    kept = ((frames > CLIPPED) & (frames < 1.0 - CLIPPED)).all(0).ravel()
    if not kept.any():
        raise DataError("every pixel is black or white in some frame; expose the calibration frames differently")
    order = np.argsort(mean[kept], kind="stable")
    parts = np.array_split(order, min(BINS, len(order)))
    mean, variance = mean[kept], variance[kept]
    groups = np.array([(mean[part].mean(), variance[part].mean(), len(part)) for part in parts])
    return Curve(*groups.T)


def fitted(scenes: list[NDArray[np.float32]]) -> Fitted:
    """Fit the line to the frames of all scenes, (k, h, w) each, by reweighted least squares.

    Source: Janesick (2007), "Photon transfer", chapter 5.

    Raises:
        DataError: The signal is the same everywhere, so that gain and offset cannot be told apart.
    """
    curves = [curve_of(frames) for frames in scenes]
    mean, variance, pixels = (np.concatenate(parts) for parts in zip(*curves, strict=True))
    if np.ptp(mean) < 1e-6:
        raise DataError("all pixels have the same signal; add a scene of another brightness, such as dark frames")
    design = np.stack([mean, np.ones_like(mean)], 1)
    line = np.maximum(variance, 1e-12)
    solution = np.zeros(2)
    for _ in range(ROUNDS):  # the variance of a variance grows with its square
        root = np.sqrt(pixels) / line
        solution = np.linalg.lstsq(design * root[:, None], variance * root, rcond=None)[0]
        line = np.maximum(design @ solution, 1e-12)
    return Fitted(max(0.0, float(solution[0])), float(solution[1]), sum(map(len, scenes)), len(scenes))


def write_noise(found: Fitted, path: Path) -> None:
    """Write a noise model as `calibration` in `[model.likelihood]` names it.

    Raises:
        DiskError: The file cannot be written.
    """
    text = (
        f"# Noise of a camera: the variance of a pixel is gain x signal + offset; white is 1.\n"
        f"[noise]\ngain = {found.gain:.9g}\noffset = {found.offset:.9g}\n\n"
        f"[measured]\nscenes = {found.scenes}\nframes = {found.frames}\n"
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiskError(f"cannot write {path} ({error.strerror}); choose another --out") from error
