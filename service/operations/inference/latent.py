"""Draws from posterior and prior in numpy. All randomness of an answer comes from the request's seed."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

MAX_SEED = 2**53 - 1
"""The largest integer that every JSON reader represents exactly."""
BLOCK_ROWS = 64
"""Rows drawn with one key."""
LOG_2_PI = math.log(2.0 * math.pi)
STREAM_BITS = 48
"""The second word of a key: the stream in the bits from this one on, the block below."""


def fresh_seed() -> int:
    """A seed for a request without one, short enough to copy by hand."""
    return secrets.randbits(32)


def standard_normal(
    seed: int, rows: int, shape: tuple[int, ...], first: int = 0, stream: int = 0
) -> NDArray[np.float32]:
    """Draws of N(0, I) for the rows from `first` on: a function of seed, stream and row alone.

    Philox is counter-based, keyed by the seed, the stream and the block of rows; within a block, rows are filled in
    order. So more rows never change the first ones, and later blocks can be drawn without them.

    Args:
        seed: The seed.
        rows: Number of rows.
        shape: Shape of one row.
        first: Index of the first row.
        stream: Number of an independent stream.

    Returns:
        Noise, (rows, *shape).
    """
    return _drawn(Generator.standard_normal, seed, rows, shape, first, stream)


def uniform(seed: int, rows: int, shape: tuple[int, ...], first: int = 0, stream: int = 0) -> NDArray[np.float32]:
    """Draws of the uniform distribution on [0, 1); otherwise as `standard_normal`."""
    return _drawn(Generator.random, seed, rows, shape, first, stream)


def _drawn(
    fill: Callable[..., Any], seed: int, rows: int, shape: tuple[int, ...], first: int, stream: int
) -> NDArray[np.float32]:
    block, before = divmod(first, BLOCK_ROWS)  # rows of the block that lie before the first one are drawn and dropped
    draws = np.empty((before + rows, *shape), np.float32)
    for start in range(0, len(draws), BLOCK_ROWS):
        key = np.array([seed, (stream << STREAM_BITS) + block + start // BLOCK_ROWS], np.uint64)
        fill(Generator(Philox(key=key)), dtype=np.float32, out=draws[start : start + BLOCK_ROWS])
    return draws[before:]


class Noise(NamedTuple):
    """The randomness of a request: its seed, None for a fresh one, and the index of its first row."""

    seed: int | None
    first: int = 0

    def settled(self) -> tuple[int, Noise]:
        """The seed that is used, and the same randomness with that seed, to draw from it more than once."""
        seed = fresh_seed() if self.seed is None else self.seed
        return seed, self._replace(seed=seed)

    def normal(self, rows: int, shape: tuple[int, ...], stream: int = 0) -> tuple[int, NDArray[np.float32]]:
        """The seed that is used, and draws of N(0, I), (rows, *shape)."""
        seed, _ = self.settled()
        return seed, standard_normal(seed, rows, shape, self.first, stream)


def posterior_draws(mean: NDArray[Any], log_var: NDArray[Any], eps: NDArray[Any]) -> NDArray[np.float32]:
    """z = mean + std * eps: mean and log_var (n, *latent), eps (n, L, *latent) -> (n, L, *latent)."""
    std = np.exp(0.5 * log_var)
    draws: NDArray[np.float32] = mean[:, None] + std[:, None] * eps
    return draws


def log_density(log_var: NDArray[Any], eps: NDArray[Any]) -> NDArray[np.float64]:
    """log q(z) in nats, (n, L), at z = mean + std * eps: log_var (n, *latent), eps (n, L, *latent)."""
    n, draws = eps.shape[:2]
    square = np.square(eps.reshape(n, draws, -1), dtype=np.float64)
    found: NDArray[np.float64] = -0.5 * (square + log_var.reshape(n, 1, -1).astype(np.float64) + LOG_2_PI).sum(2)
    return found


def path(start: NDArray[Any], end: NDArray[Any], steps: int, *, spherical: bool) -> NDArray[np.float32]:
    """Latents on a line or an arc between two latents, both ends included.

    On the arc, direction and length change evenly. Between parallel or opposite directions it is a line.

    Args:
        start: First latent.
        end: Last latent, of the same shape.
        steps: Number of latents.
        spherical: Whether the path is an arc.

    Returns:
        Latents, (steps, *latent).

    Source:
        Shoemake (1985), "Animating rotation with quaternion curves", section 3.3.
    """
    a, b = start.ravel().astype(np.float64), end.ravel().astype(np.float64)
    t = np.linspace(0.0, 1.0, steps)[:, None]
    along, lengths = (1.0 - t) * a + t * b, (np.linalg.norm(a), np.linalg.norm(b))
    if spherical and min(lengths) > 0.0:
        angle = np.arccos(np.clip(a @ b / (lengths[0] * lengths[1]), -1.0, 1.0))
        if 1e-6 < angle < np.pi - 1e-6:
            turned = (np.sin((1.0 - t) * angle) * a / lengths[0] + np.sin(t * angle) * b / lengths[1]) / np.sin(angle)
            along = turned * ((1.0 - t) * lengths[0] + t * lengths[1])
    along[0], along[-1] = a, b
    with np.errstate(over="ignore"):  # the operation refuses what is not finite
        return along.reshape(steps, *start.shape).astype(np.float32)
