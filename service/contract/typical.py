"""Whether an image is of the kind that a model was trained on, by three numbers that are measured on held-out images.

A likelihood does not tell: simple images have a high one, whatever they show. What tells are figures that are the same
for all training images and others for most other images, with bounds above and below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from service.contract.images import Pixels

STATISTICS = ("brightness", "greyness", "roughness")
"""Names of the figures, as the manifest's `far_from_training` has them."""
Figures = dict[str, NDArray[np.float32]]


def figures(y: Pixels, x: Pixels, family: str | None = None, level: NDArray[np.float32] | None = None) -> Figures:
    """The figures of each image.

    Args:
        y: Images as they were sent, (n, c, h, w) in [0, 1] without noise.
        x: Their clean estimates, or y itself.
        family: Family of the noise in y.
        level: Its level for each image, (n,); needed for families that change the mean.

    Returns:
        (n,) each. brightness: mean of the clean image, estimated by that of y; greyness: mean of 4 x (1 - x), 0 for
        black and white, 1 for middle grey; roughness: mean absolute difference between neighbours in a row.
    """
    rows = len(x)
    of_x = x.reshape(rows, -1)
    share = np.float32(1.0 / of_x.shape[1])
    mean = of_x.sum(1) * share
    square = np.einsum("ij,ij->i", of_x, of_x) * share
    steps = x[..., 1:] - x[..., :-1]
    rough = np.abs(steps, out=steps).reshape(rows, -1)
    brightness = mean if y is x else y.reshape(rows, -1).sum(1) * share
    if family in ("salt-and-pepper", "masking") and level is not None:
        kept = np.maximum(1.0 - level, np.float32(0.01))
        brightness = (brightness - (0.5 * level if family == "salt-and-pepper" else 0.0)) / kept
    return {
        "brightness": brightness,
        "greyness": np.float32(4.0) * (mean - square),
        "roughness": rough.sum(1) / np.float32(max(1, rough.shape[1])),
    }


def far(found: Figures, bounds: Mapping[str, Sequence[float]]) -> NDArray[np.bool_]:
    """Which images have a figure outside its bounds, (n,).

    Args:
        found: The figures.
        bounds: Lowest and highest usual figure, by name.
    """
    outside = np.zeros(len(next(iter(found.values()))), bool)
    for name, (low, high) in bounds.items():
        outside |= (found[name] < low) | (found[name] > high)
    return outside
