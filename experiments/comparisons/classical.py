"""Classical restorers with one setting each: calls of scikit-image, scipy and bm3d.

Each function takes a grey plane (h, w), the noise level sigma and the setting, and returns the restored plane.
Total variation, non-local means and BM3D also take an RGB image (3, h, w), whose channels they restore jointly. The
packages belong to the extra `evaluation`, and are imported at the first call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training.extras import needed

Plane = NDArray[Any]

PLANE_AXES = 2
"""Axes of a grey plane; an RGB image has one more."""
LEAST_BM3D = 16
"""Minimum pixels of the shorter side; below it bm3d crashes."""


def _channel_axis(y: Plane) -> int | None:
    return None if y.ndim == PLANE_AXES else 0


def total_variation(y: Plane, _sigma: float, weight: float) -> Plane:
    """Minimise the total variation; `weight` is that of the variation.

    Source: Chambolle (2004).
    """
    denoise = needed("skimage.restoration").denoise_tv_chambolle
    return np.asarray(denoise(y, weight=weight, eps=1e-5, max_num_iter=400, channel_axis=_channel_axis(y)))


def non_local_means(y: Plane, sigma: float, strength: float) -> Plane:
    """Average similar patches of 5 x 5 pixels within 13 x 13; the filter's h is `strength` times sigma.

    Source: Buades, Coll and Morel (2005).
    """
    denoise = needed("skimage.restoration").denoise_nl_means
    h, axis = strength * sigma, _channel_axis(y)
    return np.asarray(denoise(y, patch_size=5, patch_distance=6, h=h, sigma=sigma, fast_mode=False, channel_axis=axis))


def wiener(y: Plane, sigma: float, window: float) -> Plane:
    """Shrink towards the local mean of window x window, by the local variance.

    Source: Lim (1990), "Two-dimensional signal and image processing", equation 9.46.
    """
    from scipy import signal  # noqa: PLC0415  # slow to import, and one method needs it

    with np.errstate(divide="ignore", invalid="ignore"):  # windows without variance divide by 0 and get the mean
        return np.asarray(signal.wiener(y, int(window), noise=sigma**2))


def median(y: Plane, _sigma: float, window: float) -> Plane:
    """Take the median of window x window."""
    return np.asarray(ndimage.median_filter(y, int(window)))


def bm3d(y: Plane, sigma: float, _setting: float) -> Plane:
    """Apply both stages of block matching and collaborative filtering.

    Source: Dabov, Foi, Katkovnik and Egiazarian (2007), two papers: grey, and colour.
    """
    package = needed("bm3d")
    profile = package.BM3DProfile()
    profile.num_threads = 1
    if y.ndim == PLANE_AXES:
        return np.asarray(package.bm3d(y, sigma, profile))
    return np.asarray(package.bm3d_rgb(np.moveaxis(y, 0, -1), sigma, profile)).transpose(2, 0, 1)


def biharmonic(y: Plane, mask: Plane) -> Plane:
    """Fill in missing pixels (mask 0) by biharmonic equations.

    Source: Damelin and Hoang (2018).
    """
    return np.asarray(needed("skimage.restoration").inpaint_biharmonic(y, mask == 0))
