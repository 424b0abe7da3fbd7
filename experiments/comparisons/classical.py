"""Classical restorers of one grey plane (h, w): thin calls of scikit-image, scipy and bm3d, with one setting each.

The packages of the extra `evaluation` are imported when they are called.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training.extras import needed

Plane = NDArray[Any]

LEAST_BM3D = 16
"""Pixels of the shorter side below which bm3d crashes."""


def total_variation(y: Plane, _sigma: float, weight: float) -> Plane:
    """Minimise the total variation.

    Source: Chambolle (2004).
    """
    return np.asarray(needed("skimage.restoration").denoise_tv_chambolle(y, weight=weight, eps=1e-5, max_num_iter=400))


def non_local_means(y: Plane, sigma: float, strength: float) -> Plane:
    """Average similar patches of 5 x 5 within 13 x 13; the filter's h is `strength` sigma.

    Source: Buades, Coll and Morel (2005).
    """
    denoise = needed("skimage.restoration").denoise_nl_means
    found = denoise(y, patch_size=5, patch_distance=6, h=strength * sigma, sigma=sigma, fast_mode=False)
    return np.asarray(found)


def wiener(y: Plane, sigma: float, window: float) -> Plane:
    """Shrink towards the local mean of window x window, by the local variance.

    Source: Lim (1990), "Two-dimensional signal and image processing", equation 9.46.
    """
    from scipy import signal  # noqa: PLC0415  # slow to import, and one method needs it

    with np.errstate(divide="ignore", invalid="ignore"):  # of windows without variance, where it takes the mean
        return np.asarray(signal.wiener(y, int(window), noise=sigma**2))


def median(y: Plane, _sigma: float, window: float) -> Plane:
    """Take the median of window x window."""
    return np.asarray(ndimage.median_filter(y, int(window)))


def bm3d(y: Plane, sigma: float, _setting: float) -> Plane:
    """Block matching and collaborative filtering, both stages.

    Source: Dabov, Foi, Katkovnik and Egiazarian (2007).
    """
    package = needed("bm3d")
    profile = package.BM3DProfile()
    profile.num_threads = 1
    return np.asarray(package.bm3d(y, sigma, profile))


def biharmonic(y: Plane, mask: Plane) -> Plane:
    """Fill in missing pixels (mask 0) by biharmonic equations.

    Source: Damelin and Hoang (2018).
    """
    return np.asarray(needed("skimage.restoration").inpaint_biharmonic(y, mask == 0))
