"""POST load and unload: which models and versions are served, without a restart."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from service.control import Control
from service.errors import ControlOff, LoadRefused, UnknownModel
from service.orders import WHOLE
from service.problems import documented
from service.repository import Repository
from service.routes.examples import example
from service.routes.models import states

DONE = {
    "model": "mnist",
    "states": [{"version": "3", "state": "unloaded", "reason": "VAE_VERSIONS is latest"}],
    "workers": 2,
    "followed": 2,
}
ANSWERS = {
    **example(DONE),
    202: {"description": "Done here; some workers have not followed yet"},
    **documented(ControlOff, UnknownModel, LoadRefused),
}


def control_router(repository: Repository, control: Control, *, allowed: bool) -> APIRouter:
    """Routes of one application."""
    router = APIRouter(prefix="/v1/models/{model}", tags=["control"])

    async def order(model: str, version: str, *, loaded: bool) -> JSONResponse:
        if not allowed:
            raise ControlOff("models are not loaded or unloaded over HTTP here; set VAE_MODEL_CONTROL=true to allow it")
        workers, followed = await control.order(model, version, loaded=loaded)
        content: dict[str, Any] = {"model": model, "states": states(repository, model)}
        content |= {"workers": workers, "followed": followed}
        return JSONResponse(content, 200 if followed == workers else 202)

    @router.post("/load", summary="Load what VAE_VERSIONS wants of a model, as the folder has it", responses=ANSWERS)
    async def load(model: str) -> JSONResponse:
        return await order(model, WHOLE, loaded=True)

    @router.post("/unload", summary="Unload every version of a model", responses=ANSWERS)
    async def unload(model: str) -> JSONResponse:
        return await order(model, WHOLE, loaded=False)

    @router.post("/versions/{version}/load", summary="Load one version, as the folder has it", responses=ANSWERS)
    async def load_version(model: str, version: str) -> JSONResponse:
        return await order(model, version, loaded=True)

    @router.post("/versions/{version}/unload", summary="Unload one version", responses=ANSWERS)
    async def unload_version(model: str, version: str) -> JSONResponse:
        return await order(model, version, loaded=False)

    return router
