"""Admission to the queue: what has no room, or would be computed too late, is refused at once."""

from __future__ import annotations

from service.errors import Overloaded
from service.runtime.batch_queue import BatchQueue
from service.runtime.jobs import Batch
from service.runtime.program import Program

IN_TIME = 0.75
"""A request is admitted where the wait should take less than this share of its time."""
SMOOTHING = 0.2
"""Weight of the latest batch in the moving average of the time of a row."""


class Admission:
    """Measures the time that a row takes, and refuses requests by it.

    Args:
        queue: The queue.
        queue_rows: Rows that may wait.
    """

    def __init__(self, queue: BatchQueue, queue_rows: int) -> None:
        self._queue, self._queue_rows = queue, queue_rows
        self._row_s, self._landed = 1e-4, 0.0  # a guess until a batch has run while others waited

    def drain_s(self) -> float:
        """Estimated time for all rows that wait, in seconds."""
        return self._queue.rows * self._row_s

    def check(self, program: Program, load: int, time_left_s: float | None) -> None:
        """Refuse a request that has no room or too little time.

        Args:
            program: Its program.
            load: Rows that it would count for in the queue.
            time_left_s: Seconds until its deadline; None is no deadline.

        Raises:
            Overloaded: It is refused.
        """
        wait_s = self.drain_s() * (1 + program.rounds) / 2  # iterative work in the queue is half done on average
        if self._queue.rows + load > self._queue_rows:
            said = f"{self._queue.rows} rows wait already and VAE_QUEUE_ROWS is {self._queue_rows}"
        elif time_left_s is not None and wait_s > IN_TIME * time_left_s:
            said = f"the rows that wait take about {wait_s:.1f} s, too long for the {time_left_s:.1f} s of the request"
        else:
            return
        raise Overloaded(f"{said}; try again later", wait_s)

    def measure(self, batch: Batch, now: float) -> None:
        """Take the time of a row while others wait: from the end of the last batch to the end of this one."""
        last, self._landed = self._landed, now
        if self._queue.lanes:
            began = max(last, min(job.arrived for job, _, _ in batch.parts))
            self._row_s += SMOOTHING * ((now - began) / batch.rows - self._row_s)
