"""Calibration of the standard deviation of restored pixels, by factors measured on held-out images.

The graphs' own `std` is fitted to fast answers to all corruptions together. The manifest may hold a factor for each
quality and each way in which a pixel is observed, or a curve of factors over the noise level, such that
mean +- 1.645 std holds 90 % of the true pixels of held-out images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from service.contract.corruption import Observation, Rows
from service.contract.manifest import Curve

MOST_STD = 0.5
"""Largest standard deviation of a number in [0, 1]."""
BESIDE, APART = "missing-beside", "missing-apart"
"""Ways of missing pixels, with and without an observed one among their eight neighbours. The latents alone determine
the second, and refinement underestimates their variance by far."""


def calibrated(
    std: Rows,
    seen: Observation,
    families: Sequence[str],
    factors: Mapping[str, float],
    curves: Mapping[str, Curve] = MappingProxyType({}),
) -> Rows:
    """std with the factor of each pixel's way applied.

    Args:
        std: Standard deviations (n, c, h, w).
        seen: What the images were restored from. Curves are read at its levels: at that of a way's own family or, for
            other ways, at the root of the sum of squares.
        families: Noise families of the model, by column.
        factors: Factors by way; a way without one has 1.
        curves: Factors that depend on the level, by way; they go before `factors`.

    Returns:
        Standard deviations (n, c, h, w).
    """
    factor = np.ones_like(std)
    for way, where in ways(seen, families).items():
        told: Rows | np.float32 = np.float32(factors.get(way, 1.0))
        if way in curves:
            level = seen.level[:, families.index(way)] if way in families else seen.total
            told = np.interp(level, curves[way].levels, curves[way].factors).astype(np.float32)[:, None, None, None]
        np.copyto(factor, told, where=where)
    return widened(std, factor)


def widened(std: Rows, factor: Rows | np.float32) -> Rows:
    """std times factor where std is small, and never above `MOST_STD`.

    Multiplies the odds of the variance, as a share of the largest one, by the square of the factor. The inverse factor
    undoes it.
    """
    std = np.minimum(std, np.float32(MOST_STD))
    share = np.square(std / np.float32(MOST_STD))
    found: Rows = factor * std / np.sqrt(1.0 + (np.square(factor) - 1.0) * share)
    return found


def ways(seen: Observation, families: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The pixels of each way, as booleans that broadcast to (n, c, h, w); no pixel is in two.

    A way is an operator (`shrink-2`, `blur`), `BESIDE`, `APART`, or the noise family: of several at work in an image,
    that of the highest level. Pixels observed without noise have none.
    """
    if seen.operator is not None:
        kind, size, *_ = seen.operator
        return {f"shrink-{size}" if kind == "shrink" else kind: np.ones((1, 1, 1, 1), bool)}
    missing = seen.mask < 1.0
    if seen.family is not None:
        noise = {families[seen.family]: ~missing}
    else:
        loudest, noisy = seen.level.argmax(1), seen.level.any(1)
        rows = {column: noisy & (loudest == column) for column in range(len(families))}
        noise = {families[column]: ~missing & of[:, None, None, None] for column, of in rows.items() if of.any()}
    if not missing.any():
        return noise
    beside = sliding_window_view(np.pad(~missing, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3)).any((4, 5))
    return {**noise, BESIDE: missing & beside, APART: missing & ~beside}
