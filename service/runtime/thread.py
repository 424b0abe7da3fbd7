"""Daemon threads that run work from a queue, in order. A process ends without waiting for them: one may be stuck."""

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
    """Threads that start with the first work, and end with `close` or when this object is deleted.

    Args:
        name: Name of the threads.
        count: Number of the threads.
        prepare: Called in each thread before any work.
    """

    def __init__(self, name: str, count: int = 1, prepare: Work | None = None) -> None:
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_run_all, args=(self._queue, prepare), name=name, daemon=True) for _ in range(count)
        ]
        weakref.finalize(self, _end, self._queue, count)

    def run(self, work: Work) -> None:
        """Run some work as soon as a thread is free. The work handles its own errors.

        Raises:
            MemoryError: There is too little memory for a thread.
        """
        if self._threads[-1].ident is None:
            self._start()
        self._queue.put(work)

    def _start(self) -> None:
        try:
            for thread in self._threads:
                if thread.ident is None:
                    thread.start()
        except RuntimeError as error:  # Python names no other cause
            raise MemoryError(str(error)) from error

    def submit(self, work: Callable[[], Found]) -> Future[Found]:
        """Run some work as soon as a thread is free; the future gives its result or its error."""
        future: Future[Found] = Future()

        def compute() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  # raised where the future is awaited
                future.set_exception(error)

        self.run(compute)
        return future

    def close(self) -> None:
        """End the threads once the queue is empty. Does not wait for that."""
        _end(self._queue, len(self._threads))


def _end(queue: SimpleQueue[Work | None], threads: int) -> None:
    for _ in range(threads):
        queue.put(None)


def _run_all(queue: SimpleQueue[Work | None], prepare: Work | None) -> None:
    """Run work from a queue. Takes no reference to the owner of the thread, which may be deleted first."""
    if prepare is not None:
        prepare()
    while (work := queue.get()) is not None:
        work()
        del work  # and its batch, which would stay in memory until the next work arrives


def in_threads(function: Callable[[Given], Found], values: Iterable[Given], count: int) -> list[Found]:
    """Return `function` of every value, in order, computed in `count` threads; raises the first error."""
    threads = ComputingThreads("in_threads", count)
    try:
        futures = [threads.submit(partial(function, value)) for value in values]
        return [future.result() for future in futures]
    finally:
        threads.close()
