"""The queue of the batcher: which rows run next."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import chain

from service.errors import ServiceError
from service.runtime.jobs import Batch, Job, Part
from service.runtime.program import Program

RUN_BATCHES = 4
"""A job that is alone gives the thread as many batches at once, so that the thread need not wait for the event loop."""


class BatchQueue:
    """The batch that runs, and the jobs that wait, in one lane for each program.

    Lanes take turns, and a job of more than one batch goes to the end of its lane after each. So no request waits for
    all of another one that is large.

    Args:
        max_rows: Rows in a batch.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows, self.rows = max_rows, 0
        self.lanes: OrderedDict[Program, deque[Job]] = OrderedDict()
        self.running: Batch | None = None

    def add(self, program: Program, job: Job) -> None:
        """Put a job at the end of its program's lane."""
        self.lanes.setdefault(program, deque()).append(job)
        self.rows += job.load

    def start(self, now: float) -> Batch | None:
        """Take the next lane's batch, its jobs in order; None where no job waits."""
        while self.lanes:
            capacity = next(iter(self.lanes)).batch_rows(self.max_rows)
            program, lane = self.lanes.popitem(last=False)
            parts = self._fill(lane, capacity, now)
            if lane:
                self.lanes[program] = lane
            if parts:
                self.running = Batch(program, parts, capacity)
                return self.running
        return None

    def extend(self, batch: Batch) -> Batch:
        """Add further rows to the batch that runs where no other job waits; see `RUN_BATCHES`."""
        if len(batch.parts) == 1 and not self.lanes:
            job, start, _ = batch.parts[0]
            stop = min(job.rows, start + RUN_BATCHES * batch.capacity)
            batch = self.running = batch._replace(parts=[Part(job, start, stop)])
        return batch

    def end(self) -> None:
        """The batch has run: its jobs that have rows left go to the end of their lane."""
        assert self.running is not None
        program, parts, _ = self.running
        self.running = None
        for job, _, _ in parts:
            if job.future.done():
                self._release(job)
            else:
                self.lanes.setdefault(program, deque()).append(job)

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs of the batch that runs, then those that wait."""
        return chain(self._running(), chain.from_iterable(self.lanes.values()))

    def fail_running(self, error: ServiceError) -> None:
        """Answer the jobs of the batch that runs."""
        for job in self._running():
            job.fail(error)

    def fail_waiting(self, error: ServiceError) -> None:
        """Answer the jobs that wait, and empty the queue."""
        for job in chain.from_iterable(self.lanes.values()):
            self._release(job)
            job.fail(error)
        self.lanes.clear()

    def _running(self) -> list[Job]:
        return [] if self.running is None else [job for job, _, _ in self.running.parts]

    def _fill(self, lane: deque[Job], capacity: int, now: float) -> list[Part]:
        parts: list[Part] = []
        while lane and capacity:
            job = lane.popleft()
            if job.is_done(now):
                self._release(job)
                continue
            stop = min(job.rows, job.taken + capacity)
            if not job.taken:
                job.queue_s = now - job.arrived
            if stop == job.rows:
                self._release(job)
            parts.append(Part(job, job.taken, stop))
            capacity -= stop - job.taken
        return parts

    def _release(self, job: Job) -> None:
        """Free the room that a job takes in the queue."""
        self.rows -= job.load
        job.load = 0
