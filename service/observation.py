"""What is seen of images: the values, the noise, the operator they were seen through, and Bayes' rule through it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
OperatorName = tuple[str, int, int, int]
"""("shrink", factor, height, width): the mean of every block of factor x factor of images of that size."""

SOLVER_STEPS = 20
LEAST_VARIANCE = np.float32(1e-6)
"""Of what is seen of a pixel: a quarter of a grey level, squared."""


class Operator(NamedTuple):
    """What is seen of an image: rows @ x @ columns^T, averages over places; (seen h, h) and (seen w, w)."""

    rows: Rows
    columns: Rows

    def seen(self, x: Rows) -> Rows:
        """(..., h, w) -> (..., seen h, seen w)."""
        return np.asarray(self.rows @ x @ self.columns.T, np.float32)

    def back(self, y: Rows) -> Rows:
        """The transpose: (..., seen h, seen w) -> (..., h, w)."""
        return np.asarray(self.rows.T @ y @ self.columns, np.float32)

    def lifted(self, y: Rows) -> Rows:
        """An image that y might be of: every pixel the mean of what it was seen in."""
        found: Rows = self.back(y) / self.back(np.ones(y.shape[-2:], np.float32))
        return found

    @property
    def squared(self) -> Operator:
        """How variances pass."""
        return Operator(self.rows**2, self.columns**2)


@lru_cache(64)
def operator_of(name: OperatorName) -> Operator:
    """The operator of that name."""
    _, factor, height, width = name
    rows, columns = (np.eye(size, dtype=np.float32) for size in (height, width))
    return Operator(*(eye.reshape(-1, factor, len(eye)).mean(1) for eye in (rows, columns)))


def blur_level(name: OperatorName) -> float:
    """The standard deviation of Gaussian noise that spoils an image about as much: where recognition starts."""
    return 0.1 * math.log2(2 * name[1])


def projected(operator: Operator, x_mean: Rows, variance: Rows, y: Rows, noise: Rows) -> tuple[Rows, Rows]:
    """E[x | y] and its variance for x ~ N(x_mean, variance) seen through the operator under noise of variance `noise`.

    Shapes: x_mean and variance (n, c, h, w), y (n, c, seen h, seen w), noise (n, 1, 1, 1). By conjugate gradients,
    a fixed number of steps; the variance is exact where no two places that are seen share a pixel.
    """

    def covariance(u: Rows) -> Rows:
        found: Rows = operator.seen(variance * operator.back(u)) + noise * u
        return found

    scale = operator.squared.seen(variance) + noise
    u: Rows = np.zeros_like(y)
    residual: Any = y - operator.seen(x_mean)
    preconditioned = residual / scale
    direction, size = preconditioned, _inner(residual, preconditioned)
    for _ in range(SOLVER_STEPS):
        image = covariance(direction)
        length = size / np.maximum(_inner(direction, image), np.float32(1e-30))
        u, residual = u + length * direction, residual - length * image
        preconditioned = residual / scale
        grown = _inner(residual, preconditioned)
        direction, size = preconditioned + grown / np.maximum(size, np.float32(1e-30)) * direction, grown
    left = variance - variance * variance * operator.squared.back(1.0 / scale)
    return np.clip(x_mean + variance * operator.back(u), 0.0, 1.0), np.maximum(left, 0.0)


def _inner(a: Rows, b: Rows) -> Rows:
    """Of every row, (n, 1, 1, 1)."""
    found: Rows = np.einsum("nchw,nchw->n", a, b)[:, None, None, None]
    return found


class Observation(NamedTuple):
    """What is seen of images: y and mask (n, c, seen h, seen w), level (n, F), 0 for families that are not at work.

    family: the column of the noise at work, None for none. known: whether its level is. operator: how pixels are seen,
    None where each is for itself. Under an operator noise is Gaussian, which is the first column.
    """

    y: Rows
    mask: Rows
    level: Rows
    family: int | None
    known: bool
    operator: OperatorName | None = None

    @property
    def estimated(self) -> int | None:
        """The column to estimate."""
        return None if self.known else self.family

    def through(self) -> Operator:
        """The operator, which may be the identity."""
        if self.operator is not None:
            return operator_of(self.operator)
        return Operator(*(np.eye(size, dtype=np.float32) for size in self.y.shape[2:]))

    def lifted(self) -> tuple[Rows, Rows, Rows]:
        """y, mask and level as the recognition model takes them: images of the model's size."""
        if self.operator is None:
            return self.y, self.mask, self.level
        level = self.level.copy()
        level[:, 0] = np.maximum(level[:, 0], blur_level(self.operator))
        operator = operator_of(self.operator)
        return operator.lifted(self.y), operator.lifted(self.mask), level
