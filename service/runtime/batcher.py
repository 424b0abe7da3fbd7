"""The batcher: forms a batch of rows while the last one runs. It knows neither HTTP nor ONNX.

- No timer: a single caller never waits. Rows that arrive while a batch runs, or in the same turn of the event loop,
  form the next batch.
- Cheap batches run in the event loop, the others in one thread.
- `batch_queue` chooses the rows that run next, `admission` refuses what cannot be computed in time, `watchdog` answers
  callers whose time is up while the thread computes, and `jobs` delivers the answers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from service.errors import InferenceFailed, NotReady, ServiceError
from service.runtime.admission import Admission
from service.runtime.batch_queue import BatchQueue
from service.runtime.jobs import Batch, Job, no_memory
from service.runtime.program import Arrays, Program, Trip
from service.runtime.thread import ComputingThreads
from service.runtime.watchdog import Watchdog

LOWEST_PRIORITY = 19

log = logging.getLogger(__name__)

Computed = tuple[Arrays | ServiceError, float]
"""The outputs of one batch, or the reason why there are none, and its seconds."""


class Batcher:
    """Runs programs over rows, one batch at a time.

    A request of more than one batch takes turns with the others, so it counts as one batch in the queue.

    Args:
        max_rows: Rows in a batch.
        queue_rows: Rows that may wait; further requests are refused at once.
        linger_ms: How long the first row waits for others, in milliseconds; 0 is never.
        inline_s: Batches that cost less than this run in the event loop, in seconds.
        background: Whether the thread is nice 19, for iterative work.
        batch_limit_s: A batch that takes the thread longer is stuck. All callers are answered, and the batcher accepts
            no work until the batch comes back.
        clock: Monotonic clock, in seconds.
        observe: Called with (program, rows, queue_s of each request, inference_s) after each batch.
        on_failure: Called where a batch is stuck, or the batcher itself has failed.
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
        self.max_rows, self.linger_s, self.inline_s = max_rows, linger_ms / 1000.0, inline_s
        self.failure: BaseException | None = None
        self._clock, self._observe, self._on_failure = clock, observe, on_failure
        self._queue = BatchQueue(max_rows)
        self._admission = Admission(self._queue, queue_rows)
        self._watchdog = Watchdog(self._queue, batch_limit_s, clock)
        self._thread = ComputingThreads("inference", prepare=_be_nice if background else None)
        self._scheduled: asyncio.Handle | None = None
        self._closed, self._lone, self._pause = False, False, False

    @property
    def healthy(self) -> bool:
        """Whether it accepts work."""
        return self.failure is None and not self._closed and not self._watchdog.stuck

    @property
    def queued_rows(self) -> int:
        """Rows that wait."""
        return self._queue.rows

    @property
    def running(self) -> int:
        """Batches in the thread: 0 or 1."""
        return int(self._queue.running is not None)

    async def submit(
        self,
        program: Program,
        arrays: Arrays,
        *,
        deadline: float | None = None,
        gone: Callable[[], bool] | None = None,
        begun: bool = False,
    ) -> Trip:
        """Run a program over the rows of some arrays, in batches with the rows of other callers.

        Args:
            program: The program.
            arrays: Its inputs, all of the same number of rows.
            deadline: When the caller is answered at the latest, on the batcher's clock. Work is not started later.
            gone: Tells whether the caller has left. Asked before work that has waited, or has begun, is computed.
            begun: Whether this continues an answer that has begun; a full queue does not refuse it.

        Returns:
            The outputs, row by row, and the time that they took.

        Raises:
            Overloaded: The queue is full, or the deadline is too near.
            DeadlinePassed: The time is up.
            CallerGone: The caller has left.
            NotReady: The batcher accepts no work.
            InferenceFailed: The batch failed.
        """
        if not self.healthy:
            raise _stopped()
        rows = len(arrays[0])
        if self._lone and self._can_run_at_once(program, rows):
            return self._run_at_once(program, arrays)
        now, load = self._clock(), min(rows, self.max_rows)
        if self._queue.rows and not begun:
            self._admission.check(program, load, None if deadline is None else deadline - now)
        loop = asyncio.get_running_loop()
        job = Job(arrays, rows, load, loop.create_future(), now, deadline, gone, begun)
        self._queue.add(program, job)
        self._schedule(loop, self.linger_s)
        return await job.future

    async def close(self) -> None:
        """Refuse new work and the jobs that wait, and finish the batch that runs while a caller waits for it."""
        if not self._closed:
            self._closed = True
            self._queue.fail_waiting(_stopped())
        running = [job.future for job in self._queue.jobs()]
        if running:
            await asyncio.wait(running)
        self._thread.close()

    def drain_s(self) -> float:
        """Estimated time for all rows that wait, in seconds."""
        return self._admission.drain_s()

    def _can_run_at_once(self, program: Program, rows: int) -> bool:
        """Whether a batch of this request alone would run now, in the event loop; true only after such a batch."""
        idle = not (self._pause or self._queue.lanes or self._queue.running or self.linger_s)
        return idle and rows <= program.batch_rows(self.max_rows) and program.cost_s(rows) < self.inline_s

    def _run_at_once(self, program: Program, arrays: Arrays) -> Trip:
        """Run a request without the queue. Others that arrive in the same turn of the loop are queued."""
        self._pause = True
        asyncio.get_running_loop().call_soon(self._unpause)
        found, inference_s = self._run(program, arrays)
        if isinstance(found, ServiceError):
            raise found
        if self._observe is not None:
            self._observe(program, len(arrays[0]), [0.0], inference_s)
        return Trip(found, 0.0, inference_s)

    def _unpause(self) -> None:
        self._pause = False

    def _schedule(self, loop: asyncio.AbstractEventLoop, delay_s: float = 0.0) -> None:
        if self._scheduled is None and self._queue.running is None and self._queue.lanes:
            self._scheduled = loop.call_later(delay_s, self._turn) if delay_s else loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Start one batch. An unexpected error fails all callers; otherwise they would wait for ever."""
        self._scheduled = None
        loop = asyncio.get_running_loop()
        try:
            batch = self._queue.start(self._clock())
            if batch is None:
                return
            if batch.program.cost_s(batch.rows) < self.inline_s:
                self._land(batch, self._compute(batch))
            else:
                batch = self._queue.extend(batch)
                self._watchdog.watch(loop, self._stick)
                self._start(partial(self._compute_in_thread, loop, batch), batch)
        except Exception as error:  # noqa: BLE001  # as the docstring says
            self._die(error)

    def _start(self, compute: Callable[[], None], batch: Batch) -> None:
        try:
            self._thread.run(compute)
        except MemoryError:  # a new thread needs some
            self._land(batch, [(no_memory(), 0.0)])

    def _compute(self, batch: Batch) -> list[Computed]:
        """Run its batches until another caller arrives or one fails."""
        results: list[Computed] = []
        try:
            for arrays in batch.stacks():
                if results and (self._queue.lanes or isinstance(results[-1][0], ServiceError)):
                    break
                results.append(self._run(batch.program, arrays))
        except MemoryError:  # while the rows were stacked
            results.append((no_memory(), 0.0))
        return results

    def _run(self, program: Program, arrays: Arrays) -> Computed:
        self._watchdog.began = started = self._clock()
        found: Arrays | ServiceError
        try:
            found = program.run(*arrays)
            _check_rows(len(arrays[0]), found)
        except Exception as error:
            log.exception("a batch of %d rows failed", len(arrays[0]))
            found = no_memory() if isinstance(error, MemoryError) else _failed()
        return found, self._clock() - started

    def _compute_in_thread(self, loop: asyncio.AbstractEventLoop, batch: Batch) -> None:
        done: list[Computed] | Exception
        try:
            done = self._compute(batch)
        except Exception as error:  # noqa: BLE001  # as in _turn
            done = error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(self._land_from_thread, batch, done)

    def _land_from_thread(self, batch: Batch, done: list[Computed] | Exception) -> None:
        self._watchdog.stuck = False
        try:
            if isinstance(done, Exception):
                raise done  # noqa: TRY301  # a bug, like those of landing
            self._land(batch, done)
        except Exception as error:  # noqa: BLE001  # as in _turn
            self._die(error)
        else:
            if self._scheduled is not None:  # start the next batch before the answers are written
                self._scheduled.cancel()
                self._turn()

    def _land(self, batch: Batch, results: list[Computed]) -> None:
        """Deliver what a batch has found, and schedule the next one."""
        self._lone = len(batch.parts) == 1
        self._admission.measure(batch, self._clock())
        queue_s = [job.queue_s for job, _, _ in batch.parts]
        for found, inference_s in results:
            rows = batch.deliver(found, inference_s)
            if self._observe is not None:
                self._observe(batch.program, rows, queue_s, inference_s)
            queue_s = []
        if self._closed:
            self._queue.fail_running(_stopped())
        self._queue.end()
        self._schedule(asyncio.get_running_loop())

    def _stick(self) -> None:
        """Answer all callers of a stuck batch; the thread itself cannot be interrupted."""
        limit_s = self._watchdog.limit_s
        log.critical("a batch has run for more than VAE_BATCH_LIMIT_S (%g); no more work is taken", limit_s)
        self._fail()

    def _die(self, error: BaseException) -> None:
        log.critical("the batcher failed and takes no more work", exc_info=error)
        self.failure = error
        self._fail()
        self._queue.running = None

    def _fail(self) -> None:
        """Answer all callers, and report it."""
        self._queue.fail_running(_failed())
        self._queue.fail_waiting(_stopped())
        if self._on_failure is not None:
            self._on_failure()


def _be_nice() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)


def _failed() -> InferenceFailed:
    return InferenceFailed("the model failed on this batch; the cause is in the log")


def _stopped() -> NotReady:
    return NotReady("the engine has stopped; send the request to another instance")


def _check_rows(rows: int, arrays: Arrays) -> None:
    if any(len(array) != rows for array in arrays):
        raise RuntimeError(f"{rows} rows in, {[len(array) for array in arrays]} out")
