"""Threads for codec work that would block the event loop. Their number is fixed; deadlines bound each wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from service.api.memory import Share
from service.errors import CallerGone, DeadlinePassed, without_frames
from service.runtime.thread import ComputingThreads

T = TypeVar("T")


class Offload:
    """Runs functions in a fixed number of threads.

    A running function cannot be stopped. Its thread and memory stay taken until it ends, even after its caller got an
    answer.

    Args:
        threads: Number of threads.
    """

    def __init__(self, threads: int = 1) -> None:
        self._threads = ComputingThreads("codec", threads)
        self._free = asyncio.Semaphore(threads)

    async def run(self, work: Callable[[], T], share: Share, deadline: float, gone: Callable[[], bool]) -> T:
        """Run `work` in a thread once one is free.

        Args:
            work: The function. It sees the caller's context variables.
            share: The request's memory, held until `work` ends.
            deadline: In seconds of time.monotonic().
            gone: Whether the caller has disconnected; called once a thread is free.

        Returns:
            The result of `work`.

        Raises:
            DeadlinePassed: The deadline passed before `work` ended.
            CallerGone: The caller disconnected before `work` began.
            Exception: Any that `work` raises.
        """
        async with _until(deadline):
            await self._free.acquire()
        if gone():
            self._free.release()
            raise CallerGone("the caller hung up")
        loop = asyncio.get_running_loop()
        found: asyncio.Future[T] = loop.create_future()
        share.hold()

        def finish(settle: Callable[[], None]) -> None:
            self._free.release()
            share.give_back()
            if not found.done():
                settle()

        def compute() -> None:
            try:
                settle = partial(found.set_result, context.run(work))
            except Exception as error:  # noqa: BLE001  # raised again by the awaiting coroutine
                settle = partial(found.set_exception, without_frames(error))
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(finish, settle)

        context = copy_context()
        self._threads.run(compute)
        async with _until(deadline):
            return await found

    def close(self) -> None:
        """End the threads after their current functions, without waiting."""
        self._threads.close()


@asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            yield
    except TimeoutError as error:
        raise DeadlinePassed from error
