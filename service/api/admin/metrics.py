"""`GET /metrics`, in Prometheus' text format."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.admin.cached import Kept
from service.observability.metrics import MEDIA_TYPE, Telemetry

EXAMPLE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"example": 'vae_rows_total{model="mnist",operation="encode"} 3.0'}}}
}
KEEP_S = 1.0
"""Longest age of the text while no counter changes."""
RENDERS = 5
"""Maximum renderings of the text in `KEEP_S`, because one takes milliseconds and every client may ask for it."""


class Exposition:
    """The metrics as text, cached for up to `KEEP_S`.

    Args:
        telemetry: The metrics.
        clock: Monotonic time in seconds.
    """

    def __init__(self, telemetry: Telemetry, clock: Callable[[], float] = time.monotonic) -> None:
        self._telemetry = telemetry
        self._clock = clock
        self._rendered: deque[float] = deque(maxlen=RENDERS)
        self._changes = -1
        self._kept = Kept(b"", MEDIA_TYPE)

    def current(self) -> Kept:
        """The current text, or one that is at most `KEEP_S` old."""
        self._telemetry.flush()
        now, rendered, changes = self._clock(), self._rendered, self._telemetry.changes
        unchanged = bool(rendered) and changes == self._changes and now - rendered[-1] < KEEP_S
        often = len(rendered) == RENDERS and now - rendered[0] < KEEP_S
        if not (unchanged or often):
            self._kept, self._changes = Kept(self._telemetry.exposition(), MEDIA_TYPE), changes
            rendered.append(now)
        return self._kept


def metrics_router(telemetry: Telemetry) -> APIRouter:
    """Make the route of the metrics.

    Args:
        telemetry: The metrics.
    """
    router = APIRouter(tags=["metrics"])
    exposition = Exposition(telemetry)

    @router.get("/metrics", summary="Metrics in Prometheus' text format", response_class=Response, responses=EXAMPLE)
    async def metrics(request: Request) -> Response:
        return exposition.current().answer(request)

    return router
