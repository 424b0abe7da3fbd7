"""Progress of a load: the step it is at, for /v1/models, and for the log where it takes long."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST_S, LONGEST_S = 2.0, 60.0
"""Waits before the first and between later lines of the log, in seconds; each is twice as long as the one before."""

log = logging.getLogger(__name__)

Tell = Callable[[str], None]
"""Takes the step that begins, in a few words."""


def tell_nobody(_step: str) -> None:
    """Take a step that is not shown."""


def counted(tell: Tell, work: str, total: int) -> Callable[[], None]:
    """Return a function, for several threads, that tells `work` with a number that grows at each call."""
    lock, number = threading.Lock(), 0

    def next_one() -> None:
        nonlocal number
        with lock:
            number += 1
            tell(work.format(f"{number} of {total}"))

    return next_one


@contextmanager
def logged(step: Callable[[], str], first_s: float = FIRST_S) -> Iterator[None]:
    """Log what `step` returns while the block runs, first after `first_s` seconds, then at growing intervals."""
    done = threading.Event()

    def repeat() -> None:
        wait_s = first_s
        while not done.wait(wait_s):
            log.info("%s", step())
            wait_s = min(2 * wait_s, LONGEST_S)

    threading.Thread(target=repeat, name="progress", daemon=True).start()
    try:
        yield
    finally:
        done.set()
