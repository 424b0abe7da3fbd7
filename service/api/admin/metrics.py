"""GET metrics, for Prometheus."""

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
"""How long the text is kept where nothing was counted since."""
RENDERS = 5
"""Times in `KEEP_S` that it is written anew at most: it takes milliseconds, and anybody may ask for it."""


class Exposition:
    """The metrics as text, kept for a short time."""

    def __init__(self, telemetry: Telemetry, clock: Callable[[], float] = time.monotonic) -> None:
        self._telemetry = telemetry
        self._clock = clock
        self._rendered: deque[float] = deque(maxlen=RENDERS)
        self._changes = -1
        self._kept = Kept(b"", MEDIA_TYPE)

    def current(self) -> Kept:
        """The text as it is now, or as it was a moment ago."""
        self._telemetry.flush()
        now, rendered, changes = self._clock(), self._rendered, self._telemetry.changes
        unchanged = bool(rendered) and changes == self._changes and now - rendered[-1] < KEEP_S
        often = len(rendered) == RENDERS and now - rendered[0] < KEEP_S
        if not (unchanged or often):
            self._kept, self._changes = Kept(self._telemetry.exposition(), MEDIA_TYPE), changes
            rendered.append(now)
        return self._kept


def metrics_router(telemetry: Telemetry) -> APIRouter:
    """Routes of one application."""
    router = APIRouter(tags=["metrics"])
    exposition = Exposition(telemetry)

    @router.get("/metrics", summary="Metrics in Prometheus' text format", response_class=Response, responses=EXAMPLE)
    async def metrics(request: Request) -> Response:
        return exposition.current().answer(request)

    return router
