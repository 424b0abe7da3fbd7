"""Daemon threads that work off a queue in order. A process that ends does not wait for them, as one may be stuck."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

Work = Callable[[], None]
Given = TypeVar("Given")
Found = TypeVar("Found")


class ComputingThreads:
    """Threads started with the first work, and ended by `close` or with their owner.

    Args:
        name: Name of the threads.
        count: How many of them.
        prepare: Run in each thread before any work.
    """

    def __init__(self, name: str, count: int = 1, prepare: Work | None = None) -> None:
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_work_off, args=(self._queue, prepare), name=name, daemon=True)
            for _ in range(count)
        ]
        weakref.finalize(self, _end, self._queue, count)

    def run(self, work: Work) -> None:
        """Compute it as soon as a thread is free; errors are the work's own business."""
        if self._threads[0].ident is None:
            for thread in self._threads:
                thread.start()
        self._queue.put(work)

    def submit(self, work: Callable[[], Found]) -> Future[Found]:
        """Compute it as soon as a thread is free; the future gives its result or its error."""
        future: Future[Found] = Future()

        def compute() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  # raised again where the future is waited for
                future.set_exception(error)

        self.run(compute)
        return future

    def close(self) -> None:
        """End the threads after the work that they have, without waiting."""
        _end(self._queue, len(self._threads))


def _end(queue: SimpleQueue[Work | None], threads: int) -> None:
    for _ in range(threads):
        queue.put(None)


def _work_off(queue: SimpleQueue[Work | None], prepare: Work | None) -> None:
    """Knows the queue alone, so that a thread does not keep its owner alive."""
    if prepare is not None:
        prepare()
    while (work := queue.get()) is not None:
        work()
        del work  # with its batch, which would live until the next one comes


def in_threads(function: Callable[[Given], Found], values: Iterable[Given], count: int) -> list[Found]:
    """`function` of every value in their order, computed in `count` threads; raises the first error."""
    threads = ComputingThreads("in_threads", count)
    try:
        futures = [threads.submit(partial(function, value)) for value in values]
        return [future.result() for future in futures]
    finally:
        threads.close()
