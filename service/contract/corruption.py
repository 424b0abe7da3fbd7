"""What is seen of images: the values, the noise, the operator they were seen through, and Bayes' rule through it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
OperatorName = tuple[str, float, int, int]
"""How images of a height and width (the last two) are seen: ("shrink", factor, ...), the mean of every block of
factor x factor pixels; ("blur", deviation, ...), through a Gaussian of that standard deviation in pixels."""

SOLVER_STEPS = 20
LEAST_VARIANCE = 1e-6
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

    def lifted(self, y: Rows, mask: Rows) -> tuple[Rows, Rows]:
        """An image that y might be of, every pixel what it was seen in, and how much is seen of each of its pixels.

        That is 1 where a pixel is seen alone, else the sum of the squares of the weights of those it is seen with.
        """
        ones = np.ones(y.shape[-2:], np.float32)
        mask = mask * self.squared.seen(np.ones((self.rows.shape[1], self.columns.shape[1]), np.float32))
        if self.rows.shape[0] == self.rows.shape[1]:
            return y, mask
        return self.back(y) / self.back(ones), self.back(mask) / self.back(ones)

    @property
    def squared(self) -> Operator:
        """How variances pass."""
        return Operator(self.rows**2, self.columns**2)


@lru_cache(64)
def operator_of(name: OperatorName) -> Operator:
    """The operator of that name."""
    kind, size, height, width = name
    if kind == "shrink":
        return Operator(*(np.eye(n, dtype=np.float32).reshape(-1, int(size), n).mean(1) for n in (height, width)))
    return Operator(_blur(size, height), _blur(size, width))


def _blur(deviation: float, size: int) -> Rows:
    """A Gaussian about every place, (size, size), cut off at the edges and made to sum to 1."""
    places = np.arange(size)
    weights = np.exp(-0.5 * ((places[:, None] - places) / deviation) ** 2)
    found: Rows = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return found


def projected(operator: Operator, x_mean: Rows, variance: Rows, y: Rows, mask: Rows, noise: Rows) -> tuple[Rows, Rows]:
    """E[x | y] and its variance for x ~ N(x_mean, variance) seen through the operator under noise of variance `noise`.

    Shapes: x_mean and variance (n, c, h, w), y and mask (n, c, seen h, seen w), noise (n, 1, 1, 1). By conjugate
    gradients, a fixed number of steps; the variance is exact where no two places that are seen share a pixel.
    """

    def covariance(u: Rows) -> Rows:
        found: Rows = mask * operator.seen(variance * operator.back(u)) + noise * u
        return found

    scale = operator.squared.seen(variance) + noise
    u: Rows = np.zeros_like(y)
    residual: Any = mask * (y - operator.seen(x_mean))
    preconditioned = residual / scale
    direction, size = preconditioned, _inner(residual, preconditioned)
    for _ in range(SOLVER_STEPS):
        image = covariance(direction)
        length = size / np.maximum(_inner(direction, image), np.float32(1e-30))
        u, residual = u + length * direction, residual - length * image
        preconditioned = residual / scale
        grown = _inner(residual, preconditioned)
        direction, size = preconditioned + grown / np.maximum(size, np.float32(1e-30)) * direction, grown
    left = variance - variance * variance * operator.squared.back(mask / scale)
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

    def with_level(self, level: Rows, least: np.float32, most: np.float32) -> Observation:
        """With that level, whose estimated column is clipped to [least, most]."""
        if self.estimated is not None:
            level = level.copy()
            np.clip(level[:, self.estimated], least, most, out=level[:, self.estimated])
        return self._replace(level=level)

    def through(self) -> Operator:
        """The operator, which may be the identity."""
        if self.operator is not None:
            return operator_of(self.operator)
        return Operator(*(np.eye(size, dtype=np.float32) for size in self.y.shape[2:]))

    def lifted(self) -> tuple[Rows, Rows, Rows]:
        """y, mask and level as the recognition model takes them: images of the model's size."""
        if self.operator is None:
            return self.y, self.mask, self.level
        return (*operator_of(self.operator).lifted(self.y, self.mask), self.level)
