"""GET metrics, for Prometheus."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from service.telemetry import MEDIA_TYPE, Telemetry

EXAMPLE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"example": 'vae_rows_total{model="mnist",operation="encode"} 3.0'}}}
}


def metrics_router(telemetry: Telemetry) -> APIRouter:
    """Routes of one application."""
    router = APIRouter(tags=["metrics"])

    @router.get("/metrics", summary="Metrics in Prometheus' text format", response_class=Response, responses=EXAMPLE)
    async def metrics() -> Response:
        return Response(telemetry.exposition(), media_type=MEDIA_TYPE)

    return router
