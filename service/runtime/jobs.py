"""Requests in the queue, the batches made of their rows, and the delivery of the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from service.errors import CallerGone, DeadlinePassed, Overloaded, ServiceError
from service.runtime.program import Arrays, Program, Trip

PROBE_AFTER_S = 0.02
"""Before a job that has waited longer is computed, it is checked that its caller is still connected. The check costs
several microseconds, and with many callers every small job waits some milliseconds."""


@dataclass(slots=True, eq=False)
class Job:
    """A request in the queue.

    Args:
        arrays: Its inputs.
        rows: Number of its rows.
        load: Rows that it counts for in the queue.
        future: Its answer.
        arrived: Time of arrival, on the batcher's clock.
        deadline: When its time is up, on the batcher's clock; None is never.
        gone: Tells whether its caller has left.
        begun: Whether it continues an answer that has begun.
        taken: How many of its rows are computed.
        queue_s: How long it waited for its first batch.
        inference_s: Time of its batches in the model.
        outputs: Those of its rows, of which `taken` are computed; None before any is.
    """

    arrays: Arrays
    rows: int
    load: int
    future: asyncio.Future[Trip]
    arrived: float
    deadline: float | None
    gone: Callable[[], bool] | None
    begun: bool
    taken: int = 0
    queue_s: float = 0.0
    inference_s: float = 0.0
    outputs: Arrays | None = None

    def cut(self, start: int, stop: int) -> Arrays:
        """Return the inputs of some of its rows, as views."""
        return tuple(array[start:stop] for array in self.arrays)

    def fail(self, error: ServiceError) -> None:
        """Answer with an error, unless it is answered or cancelled."""
        if not self.future.done():
            self.future.set_exception(error)

    def fail_if_late(self, now: float) -> None:
        """Answer with DeadlinePassed where its time is up."""
        if self.deadline is not None and now >= self.deadline:
            self.fail(DeadlinePassed())

    def is_done(self, now: float) -> bool:
        """Whether it needs no computation: it is answered or cancelled, its time is up, or its caller has left."""
        self.fail_if_late(now)
        waited = self.begun or now - self.arrived > PROBE_AFTER_S
        if waited and self.gone is not None and not self.future.done() and self.gone():
            self.fail(CallerGone("the caller hung up"))
        return self.future.done()

    def deliver(self, rows: int, outputs: Arrays | ServiceError, inference_s: float) -> None:
        """Take the outputs of its next rows, or the reason why there are none; the last ones complete the answer."""
        self.taken += rows
        if self.future.done():
            return
        if isinstance(outputs, ServiceError):
            self.fail(outputs)
            return
        self.inference_s += inference_s
        try:
            self._keep(rows, outputs)
        except MemoryError:
            self.fail(no_memory())
            return
        if self.taken == self.rows:
            assert self.outputs is not None
            self.future.set_result(Trip(self.outputs, self.queue_s, self.inference_s))

    def _keep(self, rows: int, outputs: Arrays) -> None:
        """Copy the outputs of some rows to their places, while caches have them; those of all rows are kept as is."""
        if rows == self.rows:
            self.outputs = outputs
            return
        if self.outputs is None:
            self.outputs = tuple(np.empty((self.rows, *array.shape[1:]), array.dtype) for array in outputs)
        for whole, array in zip(self.outputs, outputs, strict=True):
            whole[self.taken - rows : self.taken] = array


class Part(NamedTuple):
    """Rows of a job that are in a batch."""

    job: Job
    start: int
    stop: int


class Batch(NamedTuple):
    """Rows that run together. Those of a single job may be more than `capacity`, and run one batch after another."""

    program: Program
    parts: list[Part]
    capacity: int

    @property
    def rows(self) -> int:
        """Number of its rows."""
        return sum(stop - start for _, start, stop in self.parts)

    def stacks(self) -> Iterator[Arrays]:
        """Yield the inputs of one batch after another; those of a single job are views."""
        if len(self.parts) > 1:
            cuts = [job.cut(start, stop) for job, start, stop in self.parts]
            yield tuple(np.concatenate(columns) for columns in zip(*cuts, strict=True))
            return
        ((job, start, stop),) = self.parts
        for row in range(start, stop, self.capacity):
            yield job.cut(row, min(stop, row + self.capacity))

    def deliver(self, found: Arrays | ServiceError, inference_s: float) -> int:
        """Hand each job its rows of what `stacks` yielded next; returns the number of rows.

        Args:
            found: Outputs, as many rows as the inputs had, or the reason why there are none.
            inference_s: Time in the model.
        """
        row = 0
        for job, _, stop in self.parts:
            size = min(stop - job.taken, self.capacity)
            rows = found if isinstance(found, ServiceError) else tuple(array[row : row + size] for array in found)
            job.deliver(size, rows, inference_s)
            row += size
        return row


def no_memory() -> Overloaded:
    """Return the error of a batch that memory does not suffice for."""
    return Overloaded("there is not enough memory for this batch; send fewer rows, or lower VAE_MAX_ROWS", 1.0)
