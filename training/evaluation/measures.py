"""Quality of restored images: PSNR, SSIM, coverage of their standard deviations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.extras import needed

MOST_DB = 60.0
"""Limit of an image's PSNR in dB, because one exact answer would make a mean infinite."""
DEVIATIONS = 1.645
"""Half the width of a normal's central 90 %, in standard deviations."""
LEAST_STD = 0.01
"""Pixels with a smaller posterior standard deviation (two and a half grey levels) count as known."""


def psnr(restored: NDArray[Any], x: NDArray[Any], where: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB for data in [0, 1] of each image, (n,); `where` selects pixels."""
    square = np.square(restored.astype(np.float64) - x)
    weight = np.ones_like(square) if where is None else where
    error = (square * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return -10.0 * np.log10(np.maximum(error, 10.0 ** (-MOST_DB / 10.0)))


def ssim(restored: NDArray[Any], x: NDArray[Any]) -> NDArray[np.float64]:
    """Structural similarity of each image, (n,): data range 1, a uniform window of 7 x 7, channels averaged.

    Raises:
        DependencyError: scikit-image is not installed.

    Source: Wang, Bovik, Sheikh and Simoncelli (2004), equation 13.
    """
    similarity = needed("skimage.metrics").structural_similarity
    pairs = zip(restored.astype(np.float64), x.astype(np.float64), strict=True)
    return np.array([similarity(a, b, data_range=1.0, channel_axis=0) for a, b in pairs])


def coverage(mean: NDArray[Any], std: NDArray[Any], x: NDArray[Any], where: NDArray[Any] | None = None) -> float:
    """The share of pixels within mean +- 1.645 std, among those that are not known; nan where all are known."""
    uncertain = std > LEAST_STD if where is None else (std > LEAST_STD) & (where > 0)
    inside = np.abs(x - mean) <= DEVIATIONS * std
    return float(inside[uncertain].mean()) if uncertain.any() else float("nan")
