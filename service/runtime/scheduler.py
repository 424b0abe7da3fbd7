"""Two batchers: one for interactive requests, one for iterative work on a nice-19 thread."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from typing import Any

from service.runtime.batcher import Batcher
from service.runtime.program import Arrays, ModelProgram, Program, Trip
from service.runtime.tiling import run_tiled

TILE_PIXELS = 2**20
"""Default of VAE_TILE_PIXELS."""
OF_TILES = {"levels", "watch"}
"""Arguments of `submit` for work in tiles alone."""


class Engine:
    """Everything that computes, behind one `submit`: interactive requests never wait for iterative work.

    Args:
        inline_s: Interactive batches that cost less than this run in the event loop, in seconds.
        tile_pixels: Images of free size with more pixels are worked off in tiles; pixels of a batch of such images.
        **options: Options of both batchers; see `Batcher`.
    """

    def __init__(self, *, inline_s: float = 0.0, tile_pixels: int = TILE_PIXELS, **options: Any) -> None:
        self._tile_pixels = tile_pixels
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

    def submit(self, program: Program, arrays: Arrays, **known: Any) -> Awaitable[Trip]:
        """Run a program; see `Batcher.submit`. Programs of more than one round count as iterative work.

        Images of free size share batches with others of their size, and those too large for one run are worked off in
        tiles; see `run_tiled`.

        Args:
            program: The program.
            arrays: Its inputs.
            **known: Of `Batcher.submit`; also `levels` and `watch`, see `run_tiled`.
        """
        if program.free is not None:
            assert isinstance(program, ModelProgram)
            if math.prod(program.image_size(arrays)) > self._tile_pixels:
                return run_tiled(self.submit, program, arrays, self._tile_pixels, **known)
            program = program.sized(arrays, self._tile_pixels)
        for of_tiles in OF_TILES & known.keys():
            del known[of_tiles]
        return (self._iterative if program.rounds > 1 else self._interactive).submit(program, arrays, **known)

    async def close(self) -> None:
        """Close both batchers; see `Batcher.close`."""
        await asyncio.gather(self._interactive.close(), self._iterative.close())
