"""Rows in, rows out: batches that form while the last one runs. Knows neither HTTP nor ONNX.

A lone caller never waits: there is no timer. What arrives while a batch runs, or in the same turn of the event loop,
travels together. Cheap batches run in the event loop, the others in one thread. Programs take turns, and so do
requests too large for one batch, so nobody waits for a stranger's whole request. What cannot be done in time is refused
before it is queued, and whose time is up is told so, even where the thread hangs. Long work, cut into slices, has a
batcher of its own whose thread runs when no other would.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np

from service.errors import CallerGone, DeadlinePassed, InferenceFailed, NotReady, Overloaded, ServiceError
from service.runtime.program import Arrays, Program, Trip
from service.runtime.thread import ComputingThreads

PROBE_AFTER_S = 0.005
"""A request that has waited this long is asked whether its caller is still there before it is computed."""

RUN_BATCHES = 4
"""While nobody else waits, the thread goes on with a large request for as many batches before it reports back."""
LOWEST_PRIORITY = 19
WATCH_S = 0.1
"""How often it is looked, while the thread computes, whether somebody's time is up and whether it is stuck."""
IN_TIME = 0.75
"""A request is queued where what waits before it should take less than this share of its time."""

log = logging.getLogger(__name__)


class _Job:
    """A request in the queue: `taken` of its rows are computed, in `pieces`."""

    __slots__ = (
        "arrays",
        "arrived",
        "begun",
        "deadline",
        "future",
        "gone",
        "inference_s",
        "load",
        "pieces",
        "queue_s",
        "rows",
        "taken",
    )

    def __init__(
        self,
        arrays: Arrays,
        load: int,
        future: asyncio.Future[Trip],
        arrived: float,
        deadline: float | None,
        gone: Callable[[], bool] | None,
        begun: bool,
    ) -> None:
        self.arrays, self.rows, self.load, self.future = arrays, len(arrays[0]), load, future
        self.arrived, self.deadline, self.gone, self.begun = arrived, deadline, gone, begun
        self.taken, self.queue_s, self.inference_s = 0, 0.0, 0.0
        self.pieces: list[Arrays] = []

    def cut(self, start: int, stop: int) -> Arrays:
        """Some of its rows, as views."""
        return tuple(array[start:stop] for array in self.arrays)


class _Part(NamedTuple):
    job: _Job
    start: int
    stop: int


class _Batch(NamedTuple):
    """Rows that run together; a lone part may have more than `capacity` of them, which run one batch after another."""

    program: Program
    parts: list[_Part]
    capacity: int

    @property
    def rows(self) -> int:
        """All of them."""
        return sum(stop - start for _, start, stop in self.parts)

    def stacks(self) -> Iterator[Arrays]:
        """One batch's arrays after the other; those of a lone part are views."""
        if len(self.parts) > 1:
            cuts = [job.cut(start, stop) for job, start, stop in self.parts]
            yield tuple(np.concatenate(columns) for columns in zip(*cuts, strict=True))
            return
        ((job, start, stop),) = self.parts
        for row in range(start, stop, self.capacity):
            yield job.cut(row, min(stop, row + self.capacity))


class _Done(NamedTuple):
    """One batch's arrays, or why there are none, and its seconds."""

    arrays: Arrays | ServiceError
    inference_s: float


class Batcher:
    """One engine: a lane a program, one batch at a time.

    max_rows: rows in a batch. queue_rows: rows that may wait; above it a request is refused at once. A request
    of more than a batch counts as one batch: it takes turns, so that is what it keeps a newcomer waiting.
    linger_ms: how long the first arrival waits for company; 0 is never. inline_s: batches that cost less than this run
    in the event loop. background: whether the thread gives way to all others, for long work. batch_limit_s: a batch
    that takes the thread longer is stuck: everybody is answered, and no work is taken until it comes back. observe:
    called with (program, rows, queue_s of each part, inference_s) after each batch. on_failure: called where no more
    work is taken, because a batch is stuck or the batcher itself has failed.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        queue_rows: int,
        linger_ms: float = 0.0,
        inline_s: float = 0.0,
        background: bool = False,
        batch_limit_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[Program, int, list[float], float], None] | None = None,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self.max_rows, self.queue_rows, self.batch_limit_s = max_rows, queue_rows, batch_limit_s
        self.linger_s, self.inline_s = linger_ms / 1000.0, inline_s
        self.queued_rows = 0
        self.failure: BaseException | None = None
        self.stuck = False
        self._clock, self._observe, self._on_failure = clock, observe, on_failure
        self._lanes: OrderedDict[Program, deque[_Job]] = OrderedDict()
        self._thread = ComputingThreads("inference", prepare=_yield_to_others if background else None)
        self._scheduled: asyncio.Handle | None = None
        self._watching: asyncio.Handle | None = None
        self._running: _Batch | None = None
        self._closed: asyncio.Event | None = None
        self._row_s, self._landed, self._began = 1e-4, 0.0, 0.0  # a guess, until something has had to wait
        self._lone, self._pause = False, False

    @property
    def healthy(self) -> bool:
        """Whether it takes work."""
        return self.failure is None and self._closed is None and not self.stuck

    @property
    def running(self) -> int:
        """Batches in the thread: 0 or 1."""
        return int(self._running is not None)

    async def submit(
        self,
        program: Program,
        arrays: Arrays,
        *,
        deadline: float | None = None,
        gone: Callable[[], bool] | None = None,
        begun: bool = False,
    ) -> Trip:
        """Run `program` over the rows of `arrays`, beside whoever else is waiting.

        deadline: on this batcher's clock; work that has not begun by then is not begun, and nobody waits longer.
        gone: whether the caller has left; asked before work that has waited a while, or is a further part, is begun.
        begun: whether it is a further part of an answer that has begun, which a full queue does not refuse.
        Raises: Overloaded, DeadlinePassed, CallerGone, NotReady, InferenceFailed.
        """
        if not self.healthy:
            raise _stopped()
        rows, now = len(arrays[0]), self._clock()
        if self._lone and self._can_run_at_once(program, rows):
            return self._run_at_once(program, arrays)
        load = min(rows, self.max_rows)
        if self.queued_rows and not begun:
            self._check_room(program, load, None if deadline is None else deadline - now)
        loop = asyncio.get_running_loop()
        job = _Job(arrays, load, loop.create_future(), now, deadline, gone, begun)
        self._lanes.setdefault(program, deque()).append(job)
        self.queued_rows += load
        self._schedule(loop, self.linger_s)
        return await job.future

    async def close(self) -> None:
        """Refuse new work, finish the batch that runs while anybody waits for it, answer the others with NotReady."""
        if self._closed is None:
            self._closed = asyncio.Event()
            self._fail_waiting()
            self._end_if_idle()
        await self._closed.wait()
        self._thread.close()

    def drain_s(self) -> float:
        """How long what waits should take, from the measured rate."""
        return self.queued_rows * self._row_s

    def _check_room(self, program: Program, load: int, time_left_s: float | None) -> None:
        wait_s = self.drain_s() * (1 + program.rounds) / 2  # of what waits, half is done on average
        if self.queued_rows + load > self.queue_rows:
            said = f"{self.queued_rows} rows wait already and VAE_QUEUE_ROWS is {self.queue_rows}"
        elif time_left_s is not None and wait_s > IN_TIME * time_left_s:
            said = f"the rows that wait take about {wait_s:.1f} s, too long for the {time_left_s:.1f} s of the request"
        else:
            return
        raise Overloaded(f"{said}; try again later", wait_s)

    def _can_run_at_once(self, program: Program, rows: int) -> bool:
        """Whether there is nobody to wait for: the last one was alone, and so far, in this turn, this one is."""
        idle = not (self._pause or self._lanes or self._running or self.linger_s)
        return idle and rows <= program.batch_rows(self.max_rows) and program.cost_s(rows) < self.inline_s

    def _run_at_once(self, program: Program, arrays: Arrays) -> Trip:
        """What a queue of one would do, without the queue; whoever else comes in this turn of the loop is queued."""
        self._pause = True
        asyncio.get_running_loop().call_soon(self._unpause)
        done = self._run(program, arrays)
        if isinstance(done.arrays, ServiceError):
            raise done.arrays
        self._tell(program, len(arrays[0]), [0.0], done.inference_s)
        return Trip(done.arrays, 0.0, done.inference_s)

    def _unpause(self) -> None:
        self._pause = False

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
                self._land(batch, self._compute(batch))
            else:
                self._running = batch = self._extended(batch)
                self._began = self._clock()
                self._thread.run(partial(self._compute_apart, loop, batch))
                if self._watching is None:
                    self._watching = loop.call_later(WATCH_S, self._watch)
        except Exception as error:  # noqa: BLE001  # a bug here would hang every caller; fail them all instead
            self._die(error)

    def _form(self) -> _Batch | None:
        """The next program's batch: its jobs in order; nobody is left out because somebody is large."""
        while self._lanes:
            capacity = next(iter(self._lanes)).batch_rows(self.max_rows)
            program, lane = self._lanes.popitem(last=False)
            parts = self._fill(lane, capacity, self._clock())
            if lane:
                self._lanes[program] = lane
            if parts:
                return _Batch(program, parts, capacity)
        return None

    def _extended(self, batch: _Batch) -> _Batch:
        """The same with more rows of a job that is alone, so that the thread has something to go on with."""
        if len(batch.parts) > 1 or self._lanes:
            return batch
        job, start, _ = batch.parts[0]
        return batch._replace(parts=[_Part(job, start, min(job.rows, start + RUN_BATCHES * batch.capacity))])

    def _fill(self, lane: deque[_Job], capacity: int, now: float) -> list[_Part]:
        parts: list[_Part] = []
        while lane and capacity:
            job = lane.popleft()
            if job.future.done() or self._pointless(job, now):
                self._release(job)
                continue
            stop = min(job.rows, job.taken + capacity)
            if not job.taken:
                job.queue_s = now - job.arrived
            if stop == job.rows:
                self._release(job)
            parts.append(_Part(job, job.taken, stop))
            capacity -= stop - job.taken
        return parts

    def _release(self, job: _Job) -> None:
        """It takes no more room in the queue."""
        self.queued_rows -= job.load
        job.load = 0

    def _pointless(self, job: _Job, now: float) -> bool:
        """Whether nobody would read the answer; the job's future then says why."""
        if job.deadline is not None and now >= job.deadline:
            job.future.set_exception(DeadlinePassed())
        elif job.gone is not None and (job.begun or now - job.arrived > PROBE_AFTER_S) and job.gone():
            job.future.set_exception(CallerGone("the caller hung up"))
        return job.future.done()

    def _compute(self, batch: _Batch) -> list[_Done]:
        """Batch after batch of it, until somebody else comes."""
        results: list[_Done] = []
        try:
            for arrays in batch.stacks():
                if results and (self._lanes or isinstance(results[-1].arrays, ServiceError)):
                    break
                results.append(self._run(batch.program, arrays))
        except MemoryError:  # of putting the parts together
            results.append(_Done(_no_memory(), 0.0))
        return results

    def _run(self, program: Program, arrays: Arrays) -> _Done:
        self._began = started = self._clock()
        found: Arrays | ServiceError
        try:
            found = program.run(*arrays)
            _check_rows(len(arrays[0]), found)
        except Exception as error:
            log.exception("a batch of %d rows failed", len(arrays[0]))
            found = _no_memory() if isinstance(error, MemoryError) else _failed()
        return _Done(found, self._clock() - started)

    def _compute_apart(self, loop: asyncio.AbstractEventLoop, batch: _Batch) -> None:
        """In the thread; the loop may have ended meanwhile."""
        done: list[_Done] | Exception
        try:
            done = self._compute(batch)
        except Exception as error:  # noqa: BLE001  # as in _turn
            done = error
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._land_from_thread, batch, done)

    def _watch(self) -> None:
        """While the thread computes: tell those whose time is up, and find out whether it is stuck."""
        self._watching = None
        if self._running is None:
            return
        now = self._clock()
        for job in self._jobs():
            if job.deadline is not None and now >= job.deadline and not job.future.done():
                job.future.set_exception(DeadlinePassed())
        if not self.stuck and now - self._began > self.batch_limit_s:
            self._stick()
        self._end_if_idle()
        self._watching = asyncio.get_running_loop().call_later(WATCH_S, self._watch)

    def _jobs(self) -> Iterator[_Job]:
        """Of the batch that runs, then those that wait."""
        for job, _, _ in self._running.parts if self._running else ():
            yield job
        for lane in self._lanes.values():
            yield from lane

    def _stick(self) -> None:
        """Answer everybody; the thread cannot be broken off."""
        log.critical("a batch has run for more than VAE_BATCH_LIMIT_S (%g); no more work is taken", self.batch_limit_s)
        self.stuck = True
        self._fail_running()
        self._fail_waiting()
        self._report()

    def _end_if_idle(self) -> None:
        """What `close` waits for: that nobody waits for the batch that runs."""
        if self._closed is not None and all(job.future.done() for job in self._jobs()):
            self._closed.set()

    def _land_from_thread(self, batch: _Batch, done: list[_Done] | Exception) -> None:
        self.stuck = False
        try:
            if isinstance(done, Exception):
                raise done  # noqa: TRY301  # a bug like those of landing
            self._land(batch, done)
        except Exception as error:  # noqa: BLE001  # as in _turn
            self._die(error)
        else:
            if self._scheduled is not None:  # so that the thread has work while the answers are written
                self._scheduled.cancel()
                self._turn()

    def _land(self, batch: _Batch, results: list[_Done]) -> None:
        self._lone = len(batch.parts) == 1
        self._measure(batch)
        queue_s = [job.queue_s for job, _, _ in batch.parts]
        for arrays, inference_s in results:
            row = 0
            for job, _, stop in batch.parts:
                size = min(stop - job.taken, batch.capacity)
                self._deliver(job, size, _rows(arrays, row, row + size), inference_s)
                row += size
            self._tell(batch.program, row, queue_s, inference_s)
            queue_s = []
        self._running = None  # not before: what breaks above fails whoever is in it
        for job, _, _ in batch.parts:
            self._put_back(batch.program, job)
        self._end_if_idle()
        self._schedule(asyncio.get_running_loop())

    def _deliver(self, job: _Job, rows: int, part: Arrays | ServiceError, inference_s: float) -> None:
        job.taken += rows
        if job.future.done():
            return
        if isinstance(part, ServiceError):
            job.future.set_exception(part)
            return
        job.inference_s += inference_s
        job.pieces.append(part)
        if job.taken == job.rows:
            try:
                whole = part if len(job.pieces) == 1 else tuple(map(np.concatenate, zip(*job.pieces, strict=True)))
            except MemoryError:
                job.future.set_exception(_no_memory())
            else:
                job.future.set_result(Trip(whole, job.queue_s, job.inference_s))

    def _put_back(self, program: Program, job: _Job) -> None:
        """A job with rows left goes to the end of its lane."""
        if self._closed is not None and not job.future.done():
            job.future.set_exception(_stopped())
        if job.future.done():
            self._release(job)
        else:
            self._lanes.setdefault(program, deque()).append(job)

    def _measure(self, batch: _Batch) -> None:
        """The time a row takes while others wait: what lies between one batch's end and the next one's."""
        now, last = self._clock(), self._landed
        self._landed = now
        if self._lanes:
            began = max(last, min(job.arrived for job, _, _ in batch.parts))
            self._row_s += 0.2 * ((now - began) / batch.rows - self._row_s)

    def _tell(self, program: Program, rows: int, queue_s: list[float], inference_s: float) -> None:
        if self._observe is not None:
            self._observe(program, rows, queue_s, inference_s)

    def _die(self, error: BaseException) -> None:
        log.critical("the batcher failed and takes no more work", exc_info=error)
        self.failure = error
        self._fail_running()
        self._running = None
        self._fail_waiting()
        self._end_if_idle()
        self._report()

    def _report(self) -> None:
        if self._on_failure is not None:
            self._on_failure()

    def _fail_running(self) -> None:
        for job, _, _ in self._running.parts if self._running else ():
            if not job.future.done():
                job.future.set_exception(_failed())

    def _fail_waiting(self) -> None:
        for lane in self._lanes.values():
            for job in lane:
                self._release(job)
                if not job.future.done():
                    job.future.set_exception(_stopped())
        self._lanes.clear()


def _rows(found: Arrays | ServiceError, start: int, stop: int) -> Arrays | ServiceError:
    """Some of a batch's rows, as views, or why there are none."""
    return found if isinstance(found, ServiceError) else tuple(array[start:stop] for array in found)


def _yield_to_others() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)


def _failed() -> InferenceFailed:
    return InferenceFailed("the model failed on this batch; the cause is in the log")


def _no_memory() -> Overloaded:
    return Overloaded("there is not enough memory for this batch; send fewer rows, or lower VAE_MAX_ROWS", 1.0)


def _stopped() -> NotReady:
    return NotReady("the engine has stopped; send the request to another instance")


def _check_rows(rows: int, arrays: Arrays) -> None:
    if any(len(array) != rows for array in arrays):
        raise RuntimeError(f"{rows} rows in, {[len(array) for array in arrays]} out")
