"""Rows in, rows out: batches that form while the last one runs. Knows neither HTTP nor ONNX.

A lone caller never waits: there is no timer. What arrives while a batch runs, or in the same turn of the event loop,
travels together. Cheap batches run in the event loop, the others in one thread. Programs take turns, and so do
requests too large for one batch, so nobody waits for a stranger's whole request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from service.errors import CallerGone, DeadlinePassed, InferenceFailed, NotReady, Overloaded

Arrays = tuple[NDArray[Any], ...]

PROBE_AFTER_S = 0.005
"""A request that has waited this long is asked whether its caller is still there before it is computed."""

log = logging.getLogger(__name__)


class Program(Protocol):
    """A whole operation over rows: every array in and out has one row a request row. Compared by identity."""

    weight: int
    """What one row counts for against `max_rows`: the draws it is decoded at, or 1."""

    def run(self, *arrays: NDArray[Any]) -> Arrays:
        """Compute; a row's answer never depends on the other rows."""

    def cost_s(self, rows: int) -> float:
        """About how long a batch of `rows` takes, in seconds."""


class Trip(NamedTuple):
    """What came back, and where the time went (summed over the batches that a large request needed)."""

    arrays: Arrays
    queue_s: float
    inference_s: float


@dataclass(eq=False)
class _Job:
    arrays: Arrays
    rows: int
    future: asyncio.Future[Trip]
    load: int
    arrived: float
    deadline: float | None
    gone: Callable[[], bool] | None
    taken: int = 0
    queue_s: float | None = None
    inference_s: float = 0.0
    pieces: list[Arrays] = field(default_factory=list)


class _Batch(NamedTuple):
    program: Program
    parts: list[tuple[_Job, int, int]]
    rows: int

    def stacked(self) -> Arrays:
        """The parts' rows, one array an input; a lone part is a view."""
        slices = [tuple(array[start:stop] for array in job.arrays) for job, start, stop in self.parts]
        if len(slices) == 1:
            return slices[0]
        return tuple(np.concatenate(columns) for columns in zip(*slices, strict=True))


class Batcher:
    """One engine: a lane a program, one batch at a time.

    max_rows: rows in a batch. queue_rows: rows that may wait; above it a request is refused at once. A request
    of more than a batch counts as one batch: it takes turns, so that is what it keeps a newcomer waiting.
    linger_ms: how long the first arrival waits for company; 0 is never. inline_s: batches that cost less than this run
    in the event loop. observe: called with (program, rows, queue_s of each part, inference_s) after each batch.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        queue_rows: int,
        linger_ms: float = 0.0,
        inline_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[Program, int, list[float], float], None] | None = None,
    ) -> None:
        self.max_rows, self.queue_rows = max_rows, queue_rows
        self.linger_s, self.inline_s = linger_ms / 1000.0, inline_s
        self.queued_rows = 0
        self.failure: BaseException | None = None
        self._clock, self._observe = clock, observe
        self._lanes: OrderedDict[Program, deque[_Job]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "inference")
        self._scheduled: asyncio.Handle | None = None
        self._running: _Batch | None = None
        self._closed: asyncio.Event | None = None
        self._row_s = 1e-4

    @property
    def healthy(self) -> bool:
        """Whether it takes work."""
        return self.failure is None and self._closed is None

    async def submit(
        self,
        program: Program,
        arrays: Arrays,
        *,
        deadline: float | None = None,
        gone: Callable[[], bool] | None = None,
    ) -> Trip:
        """Run `program` over the rows of `arrays`, beside whoever else is waiting.

        deadline: on this batcher's clock; work that has not begun by then is not begun.
        gone: whether the caller has left; asked before work that has waited a while is begun.
        Raises: Overloaded, DeadlinePassed, CallerGone, NotReady, InferenceFailed.
        """
        rows = len(arrays[0])
        load = min(rows, self.max_rows)
        self._admit(load)
        loop = asyncio.get_running_loop()
        job = _Job(arrays, rows, loop.create_future(), load, self._clock(), deadline, gone)
        self._lanes.setdefault(program, deque()).append(job)
        self.queued_rows += load
        self._schedule(loop, self.linger_s)
        return await job.future

    async def close(self) -> None:
        """Refuse new work, finish the batch that runs, answer everybody else with NotReady."""
        if self._closed is None:
            self._closed = asyncio.Event()
            self._fail_waiting(NotReady("the service is stopping; send the request to another instance"))
            if self._running is None:
                self._closed.set()
        await self._closed.wait()
        self._thread.shutdown(wait=True)

    def retry_after_s(self) -> float:
        """How long what waits should take, from the measured rate."""
        return self.queued_rows * self._row_s

    def _admit(self, load: int) -> None:
        if not self.healthy:
            raise NotReady("the engine has stopped; send the request to another instance")
        if self.queued_rows + load > self.queue_rows and self.queued_rows:
            raise Overloaded(
                f"{self.queued_rows} rows wait already and VAE_QUEUE_ROWS is {self.queue_rows}; try again later",
                self.retry_after_s(),
            )

    def _schedule(self, loop: asyncio.AbstractEventLoop, delay_s: float = 0.0) -> None:
        if self._scheduled is None and self._running is None and self._lanes:
            self._scheduled = loop.call_later(delay_s, self._turn) if delay_s else loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Form one batch and run it; whatever breaks here must not leave callers waiting."""
        self._scheduled = None
        loop = asyncio.get_running_loop()
        try:
            batch = self._form()
            if batch is None:
                return
            self._running = batch
            if batch.program.cost_s(batch.rows) < self.inline_s:
                self._land(batch, *self._compute(batch))
            else:
                work = loop.run_in_executor(self._thread, self._compute, batch)
                work.add_done_callback(lambda done: self._land_from_thread(batch, done))
        except Exception as error:  # noqa: BLE001  # a bug here would hang every caller; fail them all instead
            self._die(error)

    def _form(self) -> _Batch | None:
        """The next program's batch: its jobs in order, a job that does not fit in whole goes to the end of its lane."""
        while self._lanes:
            program, lane = self._lanes.popitem(last=False)
            batch = self._fill(program, lane, max(1, self.max_rows // program.weight))
            if lane:
                self._lanes[program] = lane
            if batch.rows:
                return batch
        return None

    def _fill(self, program: Program, lane: deque[_Job], capacity: int) -> _Batch:
        now, rows = self._clock(), 0
        parts: list[tuple[_Job, int, int]] = []
        unfinished: list[_Job] = []
        while lane and rows < capacity:
            job = lane.popleft()
            if job.future.done() or self._pointless(job, now):
                self.queued_rows -= job.load
                continue
            start = job.taken
            job.taken = min(job.rows, start + capacity - rows)
            job.queue_s = now - job.arrived if job.queue_s is None else job.queue_s
            parts.append((job, start, job.taken))
            rows += job.taken - start
            if job.taken < job.rows:
                unfinished.append(job)
            else:
                self.queued_rows -= job.load
        lane.extend(unfinished)
        return _Batch(program, parts, rows)

    def _pointless(self, job: _Job, now: float) -> bool:
        """Whether nobody would read the answer; the job's future then says why."""
        if job.deadline is not None and now >= job.deadline:
            job.future.set_exception(DeadlinePassed("the request's time ran out while it waited for its turn"))
        elif job.gone is not None and now - job.arrived > PROBE_AFTER_S and job.gone():
            job.future.set_exception(CallerGone("the caller hung up"))
        return job.future.done()

    def _compute(self, batch: _Batch) -> tuple[Arrays | None, float]:
        """The batch's arrays and seconds; None where the program failed, which is logged."""
        started = self._clock()
        try:
            arrays = batch.program.run(*batch.stacked())
            _check_rows(batch.rows, arrays)
        except Exception:
            log.exception("a batch of %d rows failed", batch.rows)
            return None, self._clock() - started
        return arrays, self._clock() - started

    def _land_from_thread(self, batch: _Batch, done: asyncio.Future[tuple[Arrays | None, float]]) -> None:
        try:
            self._land(batch, *done.result())
        except Exception as error:  # noqa: BLE001  # as in _turn
            self._die(error)

    def _land(self, batch: _Batch, arrays: Arrays | None, inference_s: float) -> None:
        self._running = None
        row = 0
        for job, start, stop in batch.parts:
            part = arrays and tuple(array[row : row + stop - start] for array in arrays)
            self._deliver(job, part, inference_s)
            row += stop - start
        self._row_s += 0.2 * (inference_s / batch.rows - self._row_s)
        if self._observe is not None:
            self._observe(batch.program, batch.rows, [job.queue_s or 0.0 for job, _, _ in batch.parts], inference_s)
        if self._closed is not None:
            self._closed.set()
        self._schedule(asyncio.get_running_loop())

    def _deliver(self, job: _Job, part: Arrays | None, inference_s: float) -> None:
        if job.future.done():
            return
        if part is None:
            job.future.set_exception(InferenceFailed("the model failed on this batch; the cause is in the log"))
            return
        job.inference_s += inference_s
        job.pieces.append(part)
        if sum(len(piece[0]) for piece in job.pieces) < job.rows:
            return
        whole = part if len(job.pieces) == 1 else tuple(map(np.concatenate, zip(*job.pieces, strict=True)))
        job.future.set_result(Trip(whole, job.queue_s or 0.0, job.inference_s))

    def _die(self, error: BaseException) -> None:
        log.critical("the batcher failed and takes no more work", exc_info=error)
        self.failure = error
        running, self._running = self._running, None
        for job, _, _ in running.parts if running else []:
            self._deliver(job, None, 0.0)
        self._fail_waiting(NotReady("the engine has stopped; send the request to another instance"))
        if self._closed is not None:
            self._closed.set()

    def _fail_waiting(self, error: Exception) -> None:
        for lane in self._lanes.values():
            for job in lane:
                if not job.future.done():
                    job.future.set_exception(error)
        self._lanes.clear()
        self.queued_rows = 0


def _check_rows(rows: int, arrays: Arrays) -> None:
    if any(len(array) != rows for array in arrays):
        raise RuntimeError(f"{rows} rows in, {[len(array) for array in arrays]} out")
