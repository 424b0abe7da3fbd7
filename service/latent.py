"""Posterior, prior and draws, in numpy: all the randomness there is, and every bit of it is the request's."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**53 - 1
"""The largest integer that every JSON reader keeps exact."""


def fresh_seed() -> int:
    """A seed for a request that names none; short enough to copy by hand."""
    return secrets.randbits(32)


def standard_normal(seed: int, rows: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Draws of N(0, I), (rows, *shape): a function of the seed and the row alone.

    Philox is counter-based, keyed by the seed; rows are filled in order, so more rows never change the first ones.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    return generator.standard_normal((rows, *shape), dtype=np.float32)


def posterior_draws(mean: NDArray[Any], log_var: NDArray[Any], eps: NDArray[Any]) -> NDArray[np.float32]:
    """z = mean + std * eps: mean and log_var (n, *latent), eps (n, L, *latent) -> (n, L, *latent)."""
    std = np.exp(0.5 * log_var)
    draws: NDArray[np.float32] = mean[:, None] + std[:, None] * eps
    return draws
