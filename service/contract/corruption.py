"""Corruptions of images: noise families, linear operators, observations, and the posterior under an operator."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
NoiseFamily = Literal["gaussian", "salt-and-pepper", "masking", "poisson"]
"""Noise families. Each has one parameter, its level in (0, 1].

gaussian: the standard deviation (images in [0, 1]). salt-and-pepper: the share of pixels set to 0 or 1. masking: the
share of pixels set to 0. poisson: the standard deviation at a pixel of 1.
"""
FAMILIES: tuple[NoiseFamily, ...] = get_args(NoiseFamily)
"""Their names in the order of the level's columns. The first is the noise of images seen through an operator."""
NoiseName = Literal[NoiseFamily, "processed"]
"""Names that a model's `noise_families` may have. No formula draws the last one.

processed: what a camera's pipeline and lossy compression leave in a picture. Its level is its root mean square.
"""
OperatorName = tuple[str, float, int, int]
"""An operator on images of a height and width, which are the last two parts.

("shrink", factor, ...) is the mean of every block of factor x factor pixels; ("blur", deviation, ...) is a Gaussian
blur of that standard deviation in pixels.
"""

SOLVER_STEPS = 20
"""Steps of conjugate gradients."""
SHARPEST = 1e-3
"""Standard deviation of a blur in pixels below which every pixel is seen alone; dividing by less may overflow."""
LEAST_VARIANCE = 1e-6
"""Least variance of an observed pixel: a quarter of a grey level, squared."""


class Operator(NamedTuple):
    """A separable linear operator: rows @ x @ columns^T, whose rows are averages over places.

    Attributes:
        rows: (seen h, h).
        columns: (seen w, w).
    """

    rows: Rows
    columns: Rows

    def seen(self, x: Rows) -> Rows:
        """The operator applied: (..., h, w) -> (..., seen h, seen w)."""
        return np.asarray(self.rows @ x @ self.columns.T, np.float32)

    def back(self, y: Rows) -> Rows:
        """The transpose applied: (..., seen h, seen w) -> (..., h, w)."""
        return np.asarray(self.rows.T @ y @ self.columns, np.float32)

    def lifted(self, y: Rows, mask: Rows) -> tuple[Rows, Rows]:
        """y and mask brought to the image's size, as the recognition model takes them.

        Args:
            y: Observed values (..., seen h, seen w).
            mask: 1 where a value is observed, else 0, shaped like y.

        Returns:
            An image (..., h, w), each pixel the mean of the values that it is part of; and the mask, which is 1 where a
            pixel is observed alone, else the sum of the squared weights of the pixels observed with it.
        """
        ones = np.ones(y.shape[-2:], np.float32)
        mask = mask * self.squared.seen(np.ones((self.rows.shape[1], self.columns.shape[1]), np.float32))
        if self.rows.shape[0] == self.rows.shape[1]:
            return y, mask
        return self.back(y) / self.back(ones), self.back(mask) / self.back(ones)

    @property
    def squared(self) -> Operator:
        """The operator on variances of independent pixels."""
        return Operator(self.rows**2, self.columns**2)


class Blocks(NamedTuple):
    """Means of blocks of pixels, for images of any size: what `Operator` computes, without its matrices.

    Attributes:
        factor: Height and width of a block; 1 is the identity.
        weight: Factor of the sum of a block; 1 / factor^2 makes it the mean.
    """

    factor: int
    weight: float

    def seen(self, x: Rows) -> Rows:
        """The operator applied: (..., h, w) -> (..., h / factor, w / factor)."""
        if self.factor == 1:
            return np.float32(self.weight) * x
        *axes, height, width = x.shape
        blocks = x.reshape(*axes, height // self.factor, self.factor, width // self.factor, self.factor)
        found: Rows = np.float32(self.weight) * blocks.sum((-3, -1), dtype=np.float32)
        return found

    def back(self, y: Rows) -> Rows:
        """The transpose applied: (..., h / factor, w / factor) -> (..., h, w)."""
        return np.float32(self.weight) * enlarged(y, self.factor)

    def lifted(self, y: Rows, mask: Rows) -> tuple[Rows, Rows]:
        """y and mask (..., h / factor, w / factor) as `Operator.lifted` gives them."""
        return enlarged(y, self.factor), np.float32(self.weight) * enlarged(mask, self.factor)

    @property
    def squared(self) -> Blocks:
        """The operator on variances of independent pixels."""
        return Blocks(self.factor, self.weight**2)


def enlarged(y: Rows, factor: int) -> Rows:
    """Each pixel of (..., h, w) repeated factor x factor times."""
    return y if factor == 1 else np.repeat(np.repeat(y, factor, -2), factor, -1)


def blocks_of(name: OperatorName | None) -> Blocks | None:
    """The operator with that name, as means of blocks: the identity for None, and None for a blur."""
    if name is not None and name[0] != "shrink":
        return None
    factor = 1 if name is None else int(name[1])
    return Blocks(factor, 1.0 / factor**2)


@lru_cache(16)
def operator_of(name: OperatorName) -> Operator:
    """The operator with that name."""
    kind, size, height, width = name
    if kind == "shrink":
        return Operator(*(np.eye(n, dtype=np.float32).reshape(-1, int(size), n).mean(1) for n in (height, width)))
    return Operator(_blur(size, height), _blur(size, width))


def _blur(deviation: float, size: int) -> Rows:
    """Gaussian weights around every place, (size, size), cut off at the edges; rows sum to 1."""
    places = np.arange(size)
    weights = np.exp(-0.5 * ((places[:, None] - places) / max(deviation, SHARPEST)) ** 2)
    found: Rows = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return found


def projected(
    operator: Operator | Blocks, x_mean: Rows, variance: Rows, y: Rows, mask: Rows, noise: Rows
) -> tuple[Rows, Rows]:
    """The posterior of x ~ N(x_mean, variance) given y, its image under the operator with Gaussian noise.

    Solves by conjugate gradients with a Jacobi preconditioner, a fixed number of steps. For means of blocks the
    preconditioner is the inverse, so one step is exact.

    Args:
        operator: The operator.
        x_mean: Prior mean (n, c, h, w).
        variance: Prior variance (n, c, h, w).
        y: Observed values (n, c, seen h, seen w).
        mask: 1 where y is observed, else 0, shaped like y.
        noise: Variance of the noise (n, 1, 1, 1).

    Returns:
        Mean, clipped to [0, 1], and variance (n, c, h, w). The variance is exact where no two observed values share a
        pixel.
    """

    def covariance(u: Rows) -> Rows:
        found: Rows = mask * operator.seen(variance * operator.back(u)) + noise * u
        return found

    scale = operator.squared.seen(variance) + noise
    u: Rows = np.zeros_like(y)
    residual: Any = mask * (y - operator.seen(x_mean))
    preconditioned = residual / scale
    direction, size = preconditioned, _inner(residual, preconditioned)
    for _ in range(SOLVER_STEPS if isinstance(operator, Operator) else 1):
        image = covariance(direction)
        length = size / np.maximum(_inner(direction, image), np.float32(1e-30))
        u, residual = u + length * direction, residual - length * image
        preconditioned = residual / scale
        grown = _inner(residual, preconditioned)
        direction, size = preconditioned + grown / np.maximum(size, np.float32(1e-30)) * direction, grown
    left = variance - variance * variance * operator.squared.back(mask / scale)
    return np.clip(x_mean + variance * operator.back(u), 0.0, 1.0), np.maximum(left, 0.0)


def _inner(a: Rows, b: Rows) -> Rows:
    """Inner product of each row, (n, 1, 1, 1)."""
    found: Rows = np.einsum("nchw,nchw->n", a, b)[:, None, None, None]
    return found


class Observation(NamedTuple):
    """Corrupted images, and what is known of their corruption.

    Attributes:
        y: Observed values (n, c, seen h, seen w), or levels of large images.
        mask: 1 where a value is observed, else 0, shaped like y; booleans beside levels.
        level: Noise level (n, F) by family, 0 for families that are not at work.
        family: Column of the noise at work; None for none or, where the level is to be estimated, for all families
            together. Under an operator it is Gaussian, the first.
        known: Whether the level is known; else it is to be estimated.
        operator: What the images are seen through, None for nothing.
    """

    y: Rows
    mask: Rows
    level: Rows
    family: int | None
    known: bool
    operator: OperatorName | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image behind the observation."""
        if self.operator is not None:
            return self.operator[2:]
        height, width = self.y.shape[2:]
        return height, width

    @property
    def estimated(self) -> int | None:
        """Column of the level to estimate, None where there is none."""
        return None if self.known else self.family

    @property
    def total(self) -> Rows:
        """Root of the sum of the squared levels of all families, (n,)."""
        found: Rows = np.sqrt(np.square(self.level).sum(1))
        return found

    def with_level(self, level: Rows, least: np.float32, most: np.float32) -> Observation:
        """The observation with another level, whose estimated column is clipped to [least, most]."""
        if self.estimated is not None:
            level = level.copy()
            np.clip(level[:, self.estimated], least, most, out=level[:, self.estimated])
        return self._replace(level=level)

    def through(self) -> Operator:
        """The operator, the identity where there is none."""
        if self.operator is not None:
            return operator_of(self.operator)
        return Operator(*(np.eye(size, dtype=np.float32) for size in self.y.shape[2:]))

    def lifted(self) -> tuple[Rows, Rows, Rows]:
        """y and mask (n, c, h, w), and level, as the recognition model takes them."""
        if self.operator is None:
            return self.y, self.mask, self.level
        return (*operator_of(self.operator).lifted(self.y, self.mask), self.level)
