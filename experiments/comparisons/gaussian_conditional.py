"""The best linear restorer: models images as draws of one Gaussian, and conditions it on the observation.

Source: Bishop (2006), "Pattern recognition and machine learning", equations 2.113 to 2.117.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

Matrix = NDArray[np.float64]


class ImageGaussian(NamedTuple):
    """A Gaussian N(mean, covariance) of flattened images, with mean (d,) and covariance (d, d)."""

    mean: Matrix
    covariance: Matrix

    @classmethod
    def of(cls, x: NDArray[Any]) -> ImageGaussian:
        """Fit mean and covariance of images (n, ...)."""
        rows = x.reshape(len(x), -1)
        mean = rows.mean(0, dtype=np.float64)
        centred = rows - mean.astype(np.float32)
        return cls(mean, (centred.T @ centred).astype(np.float64) / len(x))

    def given(self, y: NDArray[Any], operator: NDArray[Any], noise: float) -> Matrix:
        """Compute E[x | y] for y = operator @ x + N(0, noise).

        Args:
            y: Observations, (n, k).
            operator: A matrix, (k, d).
            noise: Variance of the noise, above 0; it is also the ridge for pixels that never vary.

        Returns:
            Restored images, (n, d).
        """
        passed = operator @ self.covariance
        seen = passed @ operator.T
        seen[np.diag_indices_from(seen)] += noise
        residual = y - operator @ self.mean
        return np.asarray(self.mean + cho_solve(cho_factor(seen), residual.T).T @ passed)
