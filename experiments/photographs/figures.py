"""Figures of one restored image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experiments.comparisons.methods import Restored, is_noise
from experiments.photographs.cases import Case, Spoilt
from service.contract.images import Pixels
from training.evaluation.measures import DEVIATIONS, LEAST_STD, MOST_DB, psnr, ssim

BLOCK = 8
"""Height and width of the blocks whose means are compared, in pixels."""
Figures = dict[str, float]


def figures(case: Case, spoilt: Spoilt, restored: Restored) -> Figures:
    """Compute the figures of one image.

    Args:
        case: What was done to it.
        spoilt: The truth and what was sent.
        restored: The answer.

    Returns:
        Figures by name: `psnr_db` (of inpainting, of the missing pixels alone) and `ssim`; where nothing is missing
        `sent_db`, the PSNR of what was sent, `affine_db` and `detail`; with deviations those of `intervals`, with an
        estimated level `level`, with draws those of `blocks`.
    """
    x, seen = spoilt
    images = restored.images.clip(0.0, 1.0)
    found = {"psnr_db": psnr(images, x, seen.missing).item(), "ssim": ssim(images, x).item()}
    if is_noise(case.task):
        found |= {"sent_db": psnr(seen.y.clip(0.0, 1.0), x).item(), "affine_db": affine_psnr(images, x)}
        found |= {"detail": detail(images) / max(detail(x), 1e-9)}
    if restored.std is not None:
        found |= intervals(restored.images, restored.std, x, seen.missing)
    if restored.level is not None:
        found["level"] = float(restored.level[0])
    if restored.draws is not None and restored.std is not None:
        found |= blocks(restored.images, restored.std, restored.draws, x)
        found |= {"draw_db": float(psnr(restored.draws[0].clip(0.0, 1.0), x).item())}
        found |= {"mean_of_draws_db": psnr(restored.draws.mean(0).clip(0.0, 1.0), x).item()}
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def intervals(mean: Pixels, std: Pixels, x: Pixels, where: Pixels | None) -> Figures:
    """Count the true pixels in the 90 % intervals mean +- 1.645 std, so that several images can be put together.

    Args:
        mean: Restored image, (1, c, h, w).
        std: Standard deviations, of the same shape.
        x: Truth, of the same shape.
        where: Pixels that count are above 0; None counts all.

    Returns:
        `covered` of `counted` pixels, and `uncertain_covered` of `uncertain_counted`, those whose std is above 0.01.
    """
    counted = np.ones_like(x, bool) if where is None else where > 0
    inside, uncertain = counted & (np.abs(x - mean) <= DEVIATIONS * std), counted & (std > LEAST_STD)
    return {
        "covered": float(inside.sum()),
        "counted": float(counted.sum()),
        "uncertain_covered": float((inside & uncertain).sum()),
        "uncertain_counted": float(uncertain.sum()),
    }


def blocks(mean: Pixels, std: Pixels, draws: Pixels, x: Pixels) -> Figures:
    """Compare the variance of means of 8 x 8 blocks with their squared error.

    Args:
        mean: Restored image, (1, c, h, w).
        std: Standard deviations of the pixels, of the same shape.
        draws: Posterior draws, (draws, 1, c, h, w).
        x: Truth, (1, c, h, w).

    Returns:
        Means over the blocks: `block_error`, the squared error of the means; `block_drawn`, their variance between the
        draws; `block_within`, what the pixels' variance that the draws do not show adds to it where it is independent
        between pixels.
    """
    errors = np.square(_block_means(mean - x))
    between = _block_means(draws).var(0, ddof=1)
    within = np.maximum(np.square(std) - draws.var(0, ddof=1), 0.0) / BLOCK**2
    return {
        "block_error": float(errors.mean()),
        "block_drawn": float(between.mean()),
        "block_within": float(_block_means(within).mean()),
    }


def affine_psnr(images: Pixels, x: Pixels) -> float:
    """PSNR after the gain and the offset with the least squared error, for one image.

    Args:
        images: Restored image, (1, c, h, w).
        x: Truth, of the same shape.

    Returns:
        dB for data in [0, 1], at most 60.
    """
    y, target = (np.asarray(one, np.float64).ravel() for one in (images, x))
    apart, aim = y - y.mean(), target - target.mean()
    gain = (apart @ aim) / max(apart @ apart, 1e-12)
    error = np.square(gain * apart - aim).mean()
    return float(-10.0 * np.log10(max(error, 10.0 ** (-MOST_DB / 10.0))))


def detail(images: Pixels) -> float:
    """Root mean square of the Laplacian, (n, c, h, w): what smoothing takes away."""
    values = np.asarray(images, np.float64)
    middle = values[..., 1:-1, 1:-1]
    sides = values[..., :-2, 1:-1] + values[..., 2:, 1:-1] + values[..., 1:-1, :-2] + values[..., 1:-1, 2:]
    return float(np.sqrt(np.square(sides - 4.0 * middle).mean()))


def _block_means(images: Pixels) -> NDArray[np.float64]:
    """Means of whole blocks of the last two axes."""
    *lead, height, width = images.shape
    high, wide = height // BLOCK, width // BLOCK
    cut = np.asarray(images[..., : high * BLOCK, : wide * BLOCK], np.float64)
    return cut.reshape(*lead, high, BLOCK, wide, BLOCK).mean((-3, -1))
