"""How far an answer is from a known one: the measure by which exports and start-up replays are judged."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GRADIENT = "_gradient"
"""Outputs whose names end so are gradients."""


def deviation(output: str, found: NDArray[Any], known: NDArray[Any]) -> float:
    """The largest difference, relative where a value is above 1.

    A gradient is a sum of large terms, its small entries no more exact than its large ones: relative to its largest.
    """
    scale = np.abs(known).max() if output.endswith(GRADIENT) else np.abs(known)
    return float((np.abs(found - known) / np.maximum(1.0, scale)).max())
