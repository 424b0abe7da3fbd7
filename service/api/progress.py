"""Long work as a stream: its newest report, as fast as the reader takes them, then its answer. No transport."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

from service.codecs.payload import Answer

SILENCE_S = 15.0
"""Seconds without a report after which the stream says so: proxies close connections that seem idle."""


class Event(NamedTuple):
    """One report: `progress`, or at the end the `answer`."""

    kind: str
    answer: Answer


async def watched(
    run: Callable[[Callable[[Answer], None]], Awaitable[Answer]], silence_s: float = SILENCE_S
) -> AsyncGenerator[Event | None, None]:
    """Run long work and report on it.

    Only the newest report is kept: a slow reader misses some, and delays neither the work nor the release of memory.
    The work is cancelled when the generator is closed.

    Args:
        run: The work. It is given a function to report with, and returns the answer.
        silence_s: Seconds without a report after which None is given.

    Yields:
        Reports, None for silence, and at last the answer.

    Raises:
        Exception: What `run` raises.
    """
    newest: deque[Answer] = deque(maxlen=1)
    news = asyncio.Event()

    def observe(so_far: Answer) -> None:
        newest.append(so_far)
        news.set()

    work = asyncio.ensure_future(run(observe))
    work.add_done_callback(lambda _: news.set())
    try:
        while not work.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(silence_s):
                    await news.wait()
            news.clear()
            if newest:
                yield Event("progress", newest.pop())
            elif not work.done():
                yield None
        yield Event("answer", work.result())
    finally:
        work.cancel()
