"""GET metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.telemetry import MEDIA_TYPE, Telemetry


def metrics_router(telemetry: Telemetry) -> APIRouter:
    """Routes of one application."""
    router = APIRouter(tags=["metrics"])

    @router.get("/metrics", summary="Metrics in Prometheus' text format", response_class=Response)
    async def metrics() -> Response:
        return Response(telemetry.exposition(), media_type=MEDIA_TYPE)

    return router
