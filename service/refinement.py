"""Refinement: variational inference for each image, by Adam along the gradient that a graph of the model gives.

Everything of a row hangs on that row alone: its noise, its step, when it has come to rest. So who shares a batch, or
a slice, can never change an answer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]

STEPS = 100
WINDOW = 10
"""After so many steps it is looked whether a row has come to rest; bound and level are means over the last ones."""
RATE = 0.06
"""Adam's step size to begin with; it falls to 0 along half a cosine."""
DECAYS = (0.9, 0.999)
AT_REST = 0.05
"""Of its own standard deviation: where no mean has moved further in a window, a row is done."""
FIRST_LOG_VAR = math.log(0.1**2)
"""Of an unknown level around its estimate, on its unbounded scale."""

_steps = np.arange(STEPS)
RATES = (0.5 * RATE * (1.0 + np.cos(np.pi * _steps / STEPS))).astype(np.float32)
DEBIASED = [(1.0 - decay ** (_steps + 1)).astype(np.float32) for decay in DECAYS]


class Ascent(NamedTuple):
    """q's mean and log_var (n, 2, k), Adam's running moments of their gradients, and the steps done (n,)."""

    q: Rows
    first: Rows
    second: Rows
    done: NDArray[np.int64]

    def rows(self, which: NDArray[Any]) -> Ascent:
        """Some of the rows."""
        return Ascent(self.q[which], self.first[which], self.second[which], self.done[which])

    def put(self, which: NDArray[np.int64], ascent: Ascent) -> None:
        """Overwrite some of the rows."""
        self.q[which], self.first[which], self.second[which], self.done[which] = ascent


def begin(mean: Rows, log_var: Rows, families: int) -> Ascent:
    """From q(z | y) (n, d), and levels that are where they were estimated, k = d + families."""
    rows = len(mean)
    of_level = np.stack([np.zeros((rows, families)), np.full((rows, families), FIRST_LOG_VAR)], 1)
    q = np.concatenate([np.stack([mean, log_var], 1), of_level], 2, dtype=np.float32)
    return Ascent(q, np.zeros_like(q), np.zeros_like(q), np.zeros(rows, np.int64))


def step(ascent: Ascent, gradient: Rows) -> Ascent:
    """One step of Adam up the gradient (n, 2, k).

    Source: Kingma and Ba (2015), algorithm 1.
    """
    first: Rows = ascent.first + np.float32(1.0 - DECAYS[0]) * (gradient - ascent.first)
    second: Rows = ascent.second + np.float32(1.0 - DECAYS[1]) * (gradient * gradient - ascent.second)
    rate, *debiased = (table[ascent.done][:, None, None] for table in (RATES, *DEBIASED))
    moved: Rows = rate * (first / debiased[0]) / (np.sqrt(second / debiased[1]) + np.float32(1e-8))
    return Ascent(ascent.q + moved, first, second, ascent.done + 1)


def at_rest(before: Rows, after: Rows) -> NDArray[np.bool_]:
    """Which rows of q (n, 2, k) have hardly moved."""
    moved = np.abs(after[:, 0] - before[:, 0]) * np.exp(-0.5 * after[:, 1])
    found: NDArray[np.bool_] = moved.max(1) < AT_REST
    return found
