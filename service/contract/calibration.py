"""Calibration: the deviation said of each pixel, brought to what held-out images have shown.

The graphs' own `std` was fitted to fast answers of all kinds together. The manifest may hold a factor for each quality
and each way in which a pixel is seen, such that mean +- 1.645 std held 90 % of the true pixels of held-out images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from service.contract.corruption import Observation, Rows

MOST_STD = 0.5
"""Of anything in [0, 1]."""
BESIDE, APART = "missing-beside", "missing-apart"
"""Missing pixels with and without one that is seen among their eight neighbours: the second are told by the latents
alone, of which refinement is far too sure."""


def calibrated(std: Rows, seen: Observation, families: Sequence[str], factors: Mapping[str, float]) -> Rows:
    """std (n, c, h, w) by the factor of the way in which each pixel is seen, 1 where none is told."""
    factor = np.ones_like(std)
    for way, where in ways(seen, families).items():
        factor[np.broadcast_to(where, std.shape)] = factors.get(way, 1.0)
    return widened(std, factor)


def widened(std: Rows, factor: Rows | np.float32) -> Rows:
    """std times factor where it is small, and never above `MOST_STD`: the odds of its variance, of the most that there
    can be, times the factor's square. The inverse takes the inverse factor.
    """  # noqa: D205  # one promise
    std = np.minimum(std, np.float32(MOST_STD))
    share = np.square(std / np.float32(MOST_STD))
    found: Rows = factor * std / np.sqrt(1.0 + (np.square(factor) - 1.0) * share)
    return found


def ways(seen: Observation, families: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Which pixels are seen in which way, as booleans that broadcast to (n, c, h, w); no pixel in two.

    A way is an operator (`shrink-2`, `blur`), `BESIDE` or `APART`, or the family of the noise; pixels that are seen
    without any have none.
    """
    if seen.operator is not None:
        kind, size, *_ = seen.operator
        return {f"shrink-{size}" if kind == "shrink" else kind: np.ones((1, 1, 1, 1), bool)}
    missing = seen.mask < 1.0
    beside = sliding_window_view(np.pad(~missing, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3)).any((4, 5))
    noise = {} if seen.family is None else {families[seen.family]: ~missing}
    return {**noise, BESIDE: missing & beside, APART: missing & ~beside}
