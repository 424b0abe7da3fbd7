"""Long work watched while it runs: what it reports, then its result, for a reader of any speed. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

from service.operations.inference.vae import Observe, Result

SILENCE_S = 15.0
"""After so long without news it is said that there is none, for proxies that close what seems idle."""


class Event(NamedTuple):
    """What is new: `progress`, or the `answer` at the end."""

    kind: str
    result: Result


async def watched(
    run: Callable[[Observe], Awaitable[Result]], silence_s: float = SILENCE_S
) -> AsyncGenerator[Event | None, None]:
    """What `run` reports and at last its result; None after every `silence_s` seconds without news.

    Only the newest report is kept: who reads slowly misses some, and holds up neither the work nor the memory. The
    work is cancelled with the generator.
    Raises: whatever `run` raises.
    """
    newest: deque[Result] = deque(maxlen=1)
    news = asyncio.Event()

    def observe(so_far: Result) -> None:
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
