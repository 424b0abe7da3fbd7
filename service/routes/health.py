"""GET health: is the process alive, should it get requests."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from service.engine import Engine
from service.errors import NotReady
from service.problems import documented
from service.repository import Repository
from service.routes.examples import example

READY = {**example({"ready": True, "models": ["mnist"]}), 503: documented()[503]}


def health_router(repository: Repository, engine: Engine) -> APIRouter:
    """Routes of one application."""
    router = APIRouter(prefix="/health", tags=["health"])

    @router.get("/live", summary="Whether the process answers", responses=example({"live": True}))
    async def live() -> dict[str, bool]:
        return {"live": True}

    @router.get("/ready", summary="Whether every model is warmed and the engine runs", responses=READY)
    async def ready() -> Response:
        if not (repository.models and engine.healthy):
            raise NotReady("no model is loaded" if not repository.models else "the engine has stopped")
        return JSONResponse({"ready": True, "models": list(repository.models)})

    return router
