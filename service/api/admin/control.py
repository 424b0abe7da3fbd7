"""`POST .../load` and `.../unload`: change which models and versions are served, without a restart."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.types import Scope

from service.api.admin.models import states
from service.api.problems import documented
from service.errors import ControlOff, LoadRefused, NoRoom, ServiceError, UnknownModel
from service.observability.audit import record
from service.operations.examples import example
from service.repository.overrides import WHOLE
from service.repository.reload import Control, Outcome
from service.repository.repository import Repository
from service.settings import Settings

DONE = {
    "model": "mnist",
    "states": [{"version": "3", "state": "unloaded", "reason": "VAE_VERSIONS is latest"}],
    "workers": 2,
    "followed": 2,
}
ANSWERS = {
    **example(DONE),
    202: {"description": "Done in this worker; other workers have not followed yet"},
    **documented(ControlOff, UnknownModel, LoadRefused, NoRoom),
}


def control_router(repository: Repository, control: Control, settings: Settings) -> APIRouter:
    """Make the routes that load and unload versions.

    Args:
        repository: The models of this worker.
        control: Carries out a load or unload request in every worker.
        settings: The settings.
    """
    router = APIRouter(prefix="/v1/models/{model}", tags=["control"])

    async def change(request: Request, model: str, version: str, *, loaded: bool) -> JSONResponse:
        workers, followed = await changed(control, settings, request.scope, model, version, loaded=loaded)
        content: dict[str, Any] = {"model": model, "states": states(repository, model)}
        content |= {"workers": workers, "followed": followed}
        return JSONResponse(content, 200 if followed == workers else 202)

    @router.post("/load", summary="Load the versions that VAE_VERSIONS selects, read again", responses=ANSWERS)
    async def load(request: Request, model: str) -> JSONResponse:
        return await change(request, model, WHOLE, loaded=True)

    @router.post("/unload", summary="Unload every version of a model", responses=ANSWERS)
    async def unload(request: Request, model: str) -> JSONResponse:
        return await change(request, model, WHOLE, loaded=False)

    @router.post("/versions/{version}/load", summary="Load one version, read again", responses=ANSWERS)
    async def load_version(request: Request, model: str, version: str) -> JSONResponse:
        return await change(request, model, version, loaded=True)

    @router.post("/versions/{version}/unload", summary="Unload one version", responses=ANSWERS)
    async def unload_version(request: Request, model: str, version: str) -> JSONResponse:
        return await change(request, model, version, loaded=False)

    return router


async def changed(
    control: Control, settings: Settings, scope: Scope, model: str, version: str, *, loaded: bool
) -> Outcome:
    """Load or unload a version, if the settings allow it, and record it for the audit.

    Args:
        control: Carries it out in every worker.
        settings: The settings.
        scope: Of the request.
        model: Name of the model.
        version: Its version; `WHOLE` is the whole model.
        loaded: Whether to load it.

    Raises:
        ControlOff: The settings do not allow it.
        ServiceError: As `Control.change`.
    """
    outcome = "internal_error"
    try:
        check_allowed(settings)
        done = await control.change(model, version, loaded=loaded)
        outcome = "ok" if done.followed == done.workers else "partial"
    except ServiceError as error:
        outcome = error.code
        raise
    finally:
        record(scope, "load" if loaded else "unload", model, version, outcome)
    return done


def check_allowed(settings: Settings) -> None:
    """Check that the settings allow load and unload requests. The right of a key is checked in `security`.

    Raises:
        ControlOff: VAE_MODEL_CONTROL is off, or it needs API keys and there are none.
    """
    if not settings.model_control:
        raise ControlOff("loading and unloading models over HTTP is disabled; set VAE_MODEL_CONTROL=true to allow it")
    if not (settings.api_keys or settings.model_control == "anonymous"):
        raise ControlOff(
            "loading and unloading models needs an API key with the right `control`, and VAE_API_KEYS names none; set "
            "it, or VAE_MODEL_CONTROL=anonymous to let every caller do it"
        )
