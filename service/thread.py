"""One thread that computes what it is given, in order. A process that ends does not wait for it, as it may be stuck."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

Work = Callable[[], None]


class ComputingThread:
    """Begun with the first work; ended by `close`, or with whoever held it.

    prepare: run in the thread before any work.
    """

    def __init__(self, name: str, prepare: Work | None = None) -> None:
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work_off, args=(self._queue, prepare), name=name, daemon=True)
        weakref.finalize(self, self._queue.put, None)

    def run(self, work: Work) -> None:
        """Compute it as soon as the thread is free; errors are the work's own business."""
        if self._thread.ident is None:
            self._thread.start()
        self._queue.put(work)

    def close(self) -> None:
        """End the thread after the work that it has, without waiting."""
        self._queue.put(None)


def _work_off(queue: SimpleQueue[Work | None], prepare: Work | None) -> None:
    """Knows the queue alone, so that a thread does not keep its owner alive."""
    if prepare is not None:
        prepare()
    while (work := queue.get()) is not None:
        work()
        del work  # with its batch, which would live until the next one comes
