"""Two batchers: one for interactive requests, one for iterative work on a nice-19 thread."""

from __future__ import annotations

import asyncio
from typing import Any

from service.runtime.batcher import Batcher
from service.runtime.program import Arrays, Program, Trip


class Engine:
    """Everything that computes, behind one `submit`: interactive requests never wait for iterative work.

    Args:
        inline_s: Interactive batches that cost less than this run in the event loop, in seconds.
        **options: Options of both batchers; see `Batcher`.
    """

    def __init__(self, *, inline_s: float = 0.0, **options: Any) -> None:
        self._interactive = Batcher(inline_s=inline_s, **options)
        self._iterative = Batcher(background=True, **options)

    @property
    def healthy(self) -> bool:
        """Whether it accepts work."""
        return self._interactive.healthy and self._iterative.healthy

    @property
    def queued_rows(self) -> int:
        """Rows in the queues."""
        return self._interactive.queued_rows + self._iterative.queued_rows

    @property
    def running(self) -> int:
        """Batches that run in threads."""
        return self._interactive.running + self._iterative.running

    async def submit(self, program: Program, arrays: Arrays, **known: Any) -> Trip:
        """Run a program; see `Batcher.submit`. Programs of more than one round count as iterative work."""
        return await (self._iterative if program.rounds > 1 else self._interactive).submit(program, arrays, **known)

    async def close(self) -> None:
        """Close both batchers; see `Batcher.close`."""
        await asyncio.gather(self._interactive.close(), self._iterative.close())
