"""`/v2` but for inference: health, metadata, configuration, statistics, and control of the repository."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from service import __version__
from service.api.admin.control import changed
from service.api.admin.health import check_ready
from service.api.admin.models import ready
from service.api.invoke import Context
from service.api.memory import Share
from service.api.request import IDENTITY, body_limits, coding_of, fields, inflated, read_body
from service.api.v2.models import config, index, metadata, offers, parted, statistics
from service.codecs.open_inference import read_fields
from service.codecs.payload import Meter
from service.errors import InvalidOption, Malformed, NotReady, quoted
from service.operations.operation import Operation
from service.repository.overrides import WHOLE
from service.repository.reload import Control
from service.repository.repository import Repository
from service.runtime.model import Model
from service.runtime.scheduler import Engine

SERVER = {
    "name": "vae-service",
    "version": __version__,
    "extensions": ["binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics"],
}
DEPENDENTS = "unload_dependents"
"""A parameter of `unload`; models here have no dependents."""


def server_router(repository: Repository, engine: Engine) -> APIRouter:
    """Make the routes that describe the server.

    Args:
        repository: The models of this worker.
        engine: Its batchers.
    """
    router = APIRouter(prefix="/v2", include_in_schema=False)  # the protocol has a document of its own

    @router.get("")
    async def server() -> dict[str, Any]:
        return SERVER

    @router.get("/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @router.get("/health/ready")
    async def server_ready(request: Request) -> dict[str, bool]:
        check_ready(repository, engine, stopping=request.app.state.stopping)
        return {"ready": True}

    return router


def models_router(context: Context, engine: Engine, operations: Mapping[str, Operation]) -> APIRouter:
    """Make the routes that describe models.

    Args:
        context: The parts that all faces share.
        engine: The batchers of this worker.
        operations: The operations by name.
    """
    router = APIRouter(prefix="/v2/models", include_in_schema=False)
    repository, settings, telemetry = context.repository, context.settings, context.telemetry

    def found(name: str, version: str | None) -> tuple[Model, Operation]:
        of, operation = parted(name, operations, repository.conditions)
        model = repository.find(of, version)
        if not offers(model, operation):
            operation.check_offered(model, repository.models)
        return model, operation

    @router.get("/stats")
    async def all_statistics() -> dict[str, Any]:
        totals = telemetry.totals()
        latest = [next(reversed(versions.values())) for versions in repository.models.values()]
        known = [(model, one) for model in latest for one in operations.values() if offers(model, one)]
        return {"model_stats": [statistics(totals, model, one) for model, one in known]}

    @router.get("/{name}")
    @router.get("/{name}/versions/{version}")
    async def model_metadata(name: str, version: str | None = None) -> dict[str, Any]:
        model, operation = found(name, version)
        return metadata(model, operation, repository.models.get(model.manifest.name, ()))

    @router.get("/{name}/ready")
    @router.get("/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        whole = name in repository.conditions
        of = name if whole else parted(name, operations, ())[0]
        ready(repository, engine, of, version)
        if not whole:
            found(name, version)
        return {"name": name, "ready": True}

    @router.get("/{name}/config")
    @router.get("/{name}/versions/{version}/config")
    async def model_config(name: str, version: str | None = None) -> dict[str, Any]:
        return config(*found(name, version), settings.max_request_rows)

    @router.get("/{name}/stats")
    @router.get("/{name}/versions/{version}/stats")
    async def model_statistics(name: str, version: str | None = None) -> dict[str, Any]:
        return {"model_stats": [statistics(telemetry.totals(), *found(name, version))]}

    return router


def repository_router(context: Context, control: Control, operations: Mapping[str, Operation]) -> APIRouter:
    """Make the routes of the model repository.

    Args:
        context: The parts that all faces share.
        control: Carries out a load or unload request in every worker.
        operations: The operations by name.
    """
    router = APIRouter(prefix="/v2/repository", include_in_schema=False)
    settings = context.settings

    @router.post("/index")
    async def repository_index(request: Request) -> JSONResponse:
        asked = (await _sent(context, request)).get("ready", False)
        if not isinstance(asked, bool):
            raise InvalidOption("ready must be true or false")
        return JSONResponse([*index(context.repository, operations.values(), ready=asked)])

    async def change(request: Request, name: str, *, loaded: bool) -> JSONResponse:
        """Load or unload the whole model that a name is of."""
        _check_parameters((await _sent(context, request)).get("parameters"), loaded=loaded)
        of, _, operation = name.rpartition(".")
        model = of if of and operation in operations else name
        workers, followed = await changed(control, settings, request.scope, model, WHOLE, loaded=loaded)
        if followed < workers:
            raise NotReady(
                f"{followed} of {workers} workers have done it; the others follow, and the index says what is served"
            )
        return JSONResponse({"name": name, "load" if loaded else "unload": True})

    @router.post("/models/{name}/load")
    async def load(request: Request, name: str) -> JSONResponse:
        return await change(request, name, loaded=True)

    @router.post("/models/{name}/unload")
    async def unload(request: Request, name: str) -> JSONResponse:
        return await change(request, name, loaded=False)

    return router


async def _sent(context: Context, request: Request) -> dict[str, Any]:
    """The fields of the JSON object in a body, which may be empty.

    Raises:
        ServiceError: It is above a limit or no such object.
    """
    share = Share(context.memory)
    try:
        _, limit = body_limits(context.settings)
        headers, meter = fields(request.scope["headers"]), Meter(reserve=share.reserve)
        coding = coding_of(headers)
        body = await read_body(request.receive, headers, limit, share)
        if body is None:
            raise Malformed("the connection was closed before the whole request had arrived")
        return read_fields(body if coding == IDENTITY else inflated(body, coding, limit, meter), meter)
    finally:
        share.give_back()


def _check_parameters(parameters: Any, *, loaded: bool) -> None:
    """Refuse parameters that would change what a model is, and unknown ones.

    Raises:
        Malformed: There is one.
    """
    if not isinstance(parameters, dict | None):
        raise Malformed("parameters must be an object")
    for name in parameters or ():
        if name == "config" or name.startswith("file:"):
            raise Malformed(
                f"the parameter {quoted(name)} is not read: a version and its files come from the model repository "
                "alone; put a new version there, and load it"
            )
        if loaded or name != DEPENDENTS:
            raise Malformed(f"the parameter {quoted(name)} is not known; leave it out")
