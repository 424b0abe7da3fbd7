"""How far an answer is from a known one: the measure by which exports and start-up replays are judged."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SUMS = ("elbo", "gradient")
"""How the names of outputs end that are sums of large terms, of which much may cancel."""


def deviation(output: str, found: NDArray[Any], known: NDArray[Any]) -> float:
    """The largest difference, relative where a value is above 1; of sums, whose small values are no more exact than
    their large ones, relative to the largest.
    """  # noqa: D205  # one promise
    scale = np.abs(known).max() if output.endswith(SUMS) else np.abs(known)
    return float((np.abs(found - known) / np.maximum(1.0, scale)).max())
