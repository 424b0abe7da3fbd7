"""Measures of restored images: PSNR, SSIM, and coverage of the standard deviations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.extras import needed

MOST_DB = 60.0
"""Maximum PSNR of an image in dB, because one exact restoration would make a mean infinite."""
DEVIATIONS = 1.645
"""Half the width of a normal's central 90 %, in standard deviations."""
LEAST_STD = 0.01
"""Pixels with a smaller posterior standard deviation (two and a half grey levels) count as known."""


def psnr(restored: NDArray[Any], x: NDArray[Any], where: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each image, for data in [0, 1].

    Args:
        restored: Restored images, (n, c, h, w).
        x: True images, (n, c, h, w).
        where: Weights of the pixels, such as 1 for those that count and 0 for others; None counts all.

    Returns:
        PSNR in dB, (n,), at most 60.
    """
    square = np.square(restored.astype(np.float64) - x)
    weight = np.ones_like(square) if where is None else where
    error = (square * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return -10.0 * np.log10(np.maximum(error, 10.0 ** (-MOST_DB / 10.0)))


def ssim(restored: NDArray[Any], x: NDArray[Any]) -> NDArray[np.float64]:
    """Structural similarity of each image: data range 1, a uniform window of 7 x 7, mean over channels.

    Args:
        restored: Restored images, (n, c, h, w).
        x: True images, (n, c, h, w).

    Returns:
        SSIM, (n,).

    Raises:
        DependencyError: scikit-image is not installed.

    Source: Wang, Bovik, Sheikh and Simoncelli (2004), equation 13.
    """
    similarity = needed("skimage.metrics").structural_similarity
    pairs = zip(restored.astype(np.float64), x.astype(np.float64), strict=True)
    return np.array([similarity(a, b, data_range=1.0, channel_axis=0) for a, b in pairs])


def coverage(mean: NDArray[Any], std: NDArray[Any], x: NDArray[Any], where: NDArray[Any] | None = None) -> float:
    """Share of the uncertain pixels within mean +- 1.645 std.

    Args:
        mean: Posterior means, of any shape.
        std: Posterior standard deviations, of the same shape. Pixels at most `LEAST_STD` do not count.
        x: True values, of the same shape.
        where: Pixels that count are above 0; None counts all.

    Returns:
        A share in [0, 1]; nan without uncertain pixels.
    """
    uncertain = std > LEAST_STD if where is None else (std > LEAST_STD) & (where > 0)
    inside = np.abs(x - mean) <= DEVIATIONS * std
    return float(inside[uncertain].mean()) if uncertain.any() else float("nan")
