"""Refinement: variational inference for each image, by Adam along a gradient that a graph of the model computes.

The noise of a row, its step and its convergence depend on that row alone, so other rows of a batch never change it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.operations.inference.vae import Result, Rows
from service.runtime.program import Arrays, Compute, Graphs, Program, Submit, Trip

REFINEMENT_STREAM = 1
"""Stream of a request's noise for the steps; its draws use another."""
STEPS = 100
WINDOW = 10
"""Steps between tests of convergence; bound and level are means over the last window."""
RATE = 0.06
"""Adam's first step size; it falls to 0 along half a cosine."""
NEARBY_RATE = 0.01
"""The same where q starts near its optimum, as the encoder's for a whole image does: larger steps add noise."""
DECAYS = (0.9, 0.999)
AT_REST = 0.05
"""A row has converged if no mean moved further than this many of its standard deviations in a window."""
FIRST_LOG_VAR = math.log(0.1**2)
"""log_var of an unknown level around its estimate, on its unbounded scale."""

_steps = np.arange(STEPS)
DEBIASED = [(1.0 - decay ** (_steps + 1)).astype(np.float32) for decay in DECAYS]


class Ascent(NamedTuple):
    """State of an ascent: mean and log_var of q (n, 2, k), Adam's moments of their gradients, steps done (n,)."""

    q: Rows
    first: Rows
    second: Rows
    done: NDArray[np.int64]

    def rows(self, which: NDArray[Any]) -> Ascent:
        """Some of the rows."""
        return Ascent(self.q[which], self.first[which], self.second[which], self.done[which])

    def posterior(self, latent_dim: int) -> tuple[Rows, Rows]:
        """mean and log_var of q(z), (n, d), without those of the level."""
        mean, log_var = (np.ascontiguousarray(part) for part in self.q[..., :latent_dim].swapaxes(0, 1))
        return mean, log_var

    def put(self, which: NDArray[np.int64], ascent: Ascent) -> None:
        """Overwrite some of the rows."""
        self.q[which], self.first[which], self.second[which], self.done[which] = ascent


def begin(mean: Rows, log_var: Rows, families: int) -> Ascent:
    """The first state, from q(z | y) (n, d) and levels at their estimates; k = d + families."""
    rows = len(mean)
    of_level = np.stack([np.zeros((rows, families)), np.full((rows, families), FIRST_LOG_VAR)], 1)
    q = np.concatenate([np.stack([mean, log_var], 1), of_level], 2, dtype=np.float32)
    return Ascent(q, np.zeros_like(q), np.zeros_like(q), np.zeros(rows, np.int64))


@lru_cache
def rates(rate: float) -> Rows:
    """Adam's step sizes, starting at `rate`."""
    found: Rows = (0.5 * rate * (1.0 + np.cos(np.pi * _steps / STEPS))).astype(np.float32)
    return found


def step(ascent: Ascent, gradient: Rows, rate: float) -> Ascent:
    """One step of Adam up the gradient (n, 2, k).

    Source:
        Kingma and Ba (2015), algorithm 1.
    """
    first: Rows = ascent.first + np.float32(1.0 - DECAYS[0]) * (gradient - ascent.first)
    second: Rows = ascent.second + np.float32(1.0 - DECAYS[1]) * (gradient * gradient - ascent.second)
    size, *debiased = (table[ascent.done][:, None, None] for table in (rates(rate), *DEBIASED))
    moved: Rows = size * (first / debiased[0]) / (np.sqrt(second / debiased[1]) + np.float32(1e-8))
    return Ascent(ascent.q + moved, first, second, ascent.done + 1)


def at_rest(before: Rows, after: Rows) -> NDArray[np.bool_]:
    """Which rows of q (n, 2, k) have converged."""
    moved = np.abs(after[:, 0] - before[:, 0]) * np.exp(-0.5 * after[:, 1])
    found: NDArray[np.bool_] = moved.max(1) < AT_REST
    return found


def climb_rows(graphs: Graphs, graph: str, _shape: tuple[int, ...], rate: float) -> Compute:
    """A state, noise (n, k) and further inputs of the graph -> the next state and the graph's further outputs.

    Args:
        graphs: The graphs.
        graph: Name of the graph that computes the gradient.
        _shape: Shape of its further inputs, because only rows of one shape can share a batch.
        rate: The first step size.
    """

    def compute(q: Rows, first: Rows, second: Rows, done: Any, eps: Rows, *given: Rows) -> Arrays:
        *told, in_mean, in_log_var = graphs[graph](q[:, 0], q[:, 1], eps, *given)
        return (*step(Ascent(q, first, second, done), np.stack([in_mean, in_log_var], 1), rate), *told)

    return compute


class Waypoint(NamedTuple):
    """An ascent after a window.

    Args:
        step: Steps done.
        active: Rows that have not converged.
        ascent: The state of every row.
        told: Further outputs of the graph for every row, the bound first.
        spent: Time so far.
    """

    step: int
    active: int
    ascent: Ascent
    told: list[Rows]
    spent: Trip

    def result(self, shown: dict[str, Rows]) -> Result:
        """The progress report, with the bound of every row and the outputs in `shown`."""
        about = {"step": self.step, "steps": STEPS, "active": self.active, "elbo": self.told[0].copy()}
        return Result(shown, about, self.spent)


async def ascend(
    submit: Submit,
    program: Program,
    ascent: Ascent,
    eps: Rows,
    given: tuple[Rows, ...],
    watch: Callable[[Waypoint], Awaitable[None]] | None = None,
) -> tuple[Ascent, list[Rows], Trip]:
    """Climb, one step a trip, until every row has converged or done all its steps.

    Args:
        submit: Submits a program.
        program: A program of `climb_rows`.
        ascent: The first state.
        eps: Noise, (n, STEPS, k).
        given: Further inputs of the graph, (n, ...).
        watch: Called after every window.

    Returns:
        The last state, means of the graph's further outputs over the last window, and the time.
    """
    active, climbing, spent = np.arange(len(eps)), ascent, Trip((), 0.0, 0.0)
    told: list[Rows] = []
    for start in range(0, STEPS, WINDOW):
        before, window = climbing, []
        for k in range(start, start + WINDOW):
            further = {"begun": True} if k else {}  # a full queue may refuse the first step alone
            trip = await submit(program, (*climbing, eps[active, k], *given), **further)
            climbing, spent = Ascent(*trip.arrays[:4]), trip.after(spent)
            window.append(trip.arrays[4:])
        means = [np.mean(column, 0) for column in zip(*window, strict=True)]
        told = told or [mean.copy() for mean in means]  # at first every row is active
        for whole, mean in zip(told, means, strict=True):
            whole[active] = mean
        moving = ~at_rest(before.q, climbing.q)
        ascent.put(active, climbing)  # after the comparison, because `before` may be a view of it
        if not moving.all():
            active, climbing = active[moving], climbing.rows(moving)
            given = tuple(part[moving] for part in given)
        if watch is not None:
            await watch(Waypoint(start + WINDOW, len(active), ascent, told, spent))
        if not len(active):
            break
    return ascent, told, spent
