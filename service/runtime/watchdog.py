"""The watchdog of the batcher's thread: deadlines that pass, and batches that are stuck."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.runtime.batch_queue import BatchQueue

WATCH_S = 0.1
"""Watchdog interval, in seconds."""


class Watchdog:
    """Checks, while the thread computes, whether the time of a job is up and whether the batch is stuck.

    Args:
        queue: The queue.
        limit_s: A batch that takes longer is stuck.
        clock: Clock of the deadlines, in seconds.
    """

    def __init__(self, queue: BatchQueue, limit_s: float, clock: Callable[[], float]) -> None:
        self.limit_s, self._queue, self._clock = limit_s, queue, clock
        self.began = 0.0
        self.stuck = False
        self._scheduled: asyncio.Handle | None = None

    def watch(self, loop: asyncio.AbstractEventLoop, on_stuck: Callable[[], None]) -> None:
        """Check until no batch runs in the thread. Set `began` again where the thread begins another one by itself."""
        self.began = self._clock()
        if self._scheduled is None:
            self._scheduled = loop.call_later(WATCH_S, self._check, loop, on_stuck)

    def _check(self, loop: asyncio.AbstractEventLoop, on_stuck: Callable[[], None]) -> None:
        self._scheduled = None
        if self._queue.running is None:
            return
        now = self._clock()
        for job in self._queue.jobs():
            job.fail_if_late(now)
        if not self.stuck and now - self.began > self.limit_s:
            self.stuck = True
            on_stuck()
        self._scheduled = loop.call_later(WATCH_S, self._check, loop, on_stuck)
