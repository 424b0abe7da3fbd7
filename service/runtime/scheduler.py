"""Two batchers: one for short work, one for long work, whose thread gives way to everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from service.observability.metrics import Telemetry
from service.runtime.batcher import Batcher
from service.runtime.program import Arrays, Program, Trip
from service.settings import Settings


class Engine:
    """What computes, behind one `submit`: nobody waits for long work, which takes what processor time is left.

    on_failure: called where no more work is taken.
    """

    def __init__(self, settings: Settings, on_failure: Callable[[], None] | None = None) -> None:
        self.telemetry = Telemetry(lambda: (self.queued_rows, self.running))
        self._short, self._long = (
            Batcher(
                max_rows=settings.max_rows,
                queue_rows=settings.queue_rows,
                linger_ms=settings.linger_ms,
                inline_s=inline_us / 1e6,
                background=background,
                batch_limit_s=settings.batch_limit_s,
                observe=self.telemetry.batch,
                on_failure=on_failure,
            )
            for inline_us, background in ((settings.inline_us, False), (0.0, True))
        )

    @property
    def healthy(self) -> bool:
        """Whether it takes work."""
        return self._short.healthy and self._long.healthy

    @property
    def queued_rows(self) -> int:
        """Rows that wait."""
        return self._short.queued_rows + self._long.queued_rows

    @property
    def running(self) -> int:
        """Batches that are being computed in threads."""
        return self._short.running + self._long.running

    async def submit(self, program: Program, arrays: Arrays, **known: Any) -> Trip:
        """As `Batcher.submit`, by the batcher for work of its kind."""
        return await (self._long if program.rounds > 1 else self._short).submit(program, arrays, **known)

    async def close(self) -> None:
        """Answer or refuse everybody."""
        await asyncio.gather(self._short.close(), self._long.close())
