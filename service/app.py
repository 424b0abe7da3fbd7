"""The application: repository, engine, routes and middleware, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service import __version__, process
from service.api import problems
from service.api.admin.control import control_router
from service.api.admin.docs import SCRIPT_HASHES, docs_router
from service.api.admin.health import health_router
from service.api.admin.metrics import metrics_router
from service.api.admin.models import card_router, models_router, readiness_router
from service.api.diffusers.endpoint import FUNCTIONS
from service.api.invoke import Context
from service.api.memory import Memory
from service.api.offload import Offload
from service.api.playground.page import page_router
from service.api.playground.preview import preview
from service.api.v1.endpoint import OperationApp
from service.api.v1.openapi import PATHS, with_operations
from service.api.v2 import router as v2
from service.api.v2.endpoint import INFER_PATHS, InferApp
from service.contract.cores import cpu_count
from service.errors import ServiceError
from service.observability.access_log import AccessLog
from service.observability.metrics import Telemetry
from service.observability.request_ids import RequestIds
from service.observability.tracing import Named, finish, traced, tracer_provider
from service.operations.operation import Operation
from service.operations.registry import OPERATIONS
from service.repository.overrides import Overrides, SharedState
from service.repository.reload import Control
from service.repository.remote import local_copy
from service.repository.repository import Repository
from service.repository.selection import Selection
from service.repository.version import LoadRules
from service.runtime.scheduler import Engine
from service.runtime.session import execution_provider
from service.security.middleware import add_access_control
from service.security.proxies import Proxies
from service.security.security_headers import SecurityHeaders
from service.server.application import Application
from service.server.methods import Methods, RootPath
from service.settings import Settings

NOT_FOUND = 404
OTHER_FACES = (
    "Two more interfaces are served, for the clients of other projects: `/v2` speaks the Open Inference "
    "Protocol with the extensions of Triton, and `/diffusers/{model}/decode` and `/encode` are the remote VAE of "
    "diffusers. They are not listed here, because their clients bring their own descriptions; the project's page "
    "`docs/clients.md` has both."
)
"""What the OpenAPI document says of paths that it leaves out."""
MAX_QUOTED = 100
"""Characters of a path that an error repeats."""


def open_repository(settings: Settings, overrides: Overrides = Overrides()) -> Repository:  # noqa: B008  # a tuple
    """Fetch, check, open and warm up the models that the settings and the overrides select.

    Raises:
        StartError: A model cannot be fetched or served.
    """
    provider = execution_provider(settings.execution_provider)
    threads = settings.threads or max(1, cpu_count() // settings.workers)
    models, selection = local_copy(settings), Selection(settings.versions)
    rules = LoadRules(settings.load_limit_s, settings.load_memory_bytes, settings.model_public_keys)
    return Repository.open(
        models, settings.default_model, provider, threads, settings.max_rows, selection, overrides, rules
    )


def create_app(
    settings: Settings,
    repository: Repository | None = None,
    on_failure: Callable[[], None] | None = None,
    shared_folder: Path | None = None,
) -> Application:
    """Build the application.

    Args:
        settings: The settings of the service.
        repository: The models; None opens those that the settings name.
        on_failure: Called when the engine accepts no more work.
        shared_folder: Folder of all workers; None where there is one worker.

    Raises:
        StartError: The models cannot be opened, or the keys cannot be read.
    """
    shared = SharedState(shared_folder)
    repository = repository or open_repository(settings, shared.overrides())
    provider = tracer_provider() if settings.tracing else None
    telemetry = Telemetry(lambda: (engine.queued_rows, engine.running))
    engine = make_engine(settings, telemetry, on_failure)
    submit = traced(engine.submit, provider) if provider else engine.submit
    offload = Offload(cpu_count())
    context = Context(settings, repository, submit, telemetry, Memory(settings.memory_bytes), offload)
    control = Control(repository, shared, settings, telemetry.ready)
    app = Application(
        problems.respond,
        lambda app: SecurityHeaders(Methods(app), SCRIPT_HASHES),
        lambda document: with_operations(document, OPERATIONS),
        title="VAE service",
        version=__version__,
        summary="Variational auto-encoders over HTTP: encode, decode, reconstruct, restore, sample.",
        description=OTHER_FACES,
        lifespan=lifespan_of(settings, engine, control, offload, partial(finish, provider) if provider else None),
        openapi_url=None,  # ours is in api/admin/docs.py
        redirect_slashes=False,  # FastAPI's redirects go to the host that the Host header names
        dependencies=[Depends(HTTPBearer(auto_error=False))] if settings.api_keys else [],  # for OpenAPI
        # FastAPI checks these at every request; metrics are ours, at /metrics.
        telemetry={
            "tracing": settings.tracing,
            "tracer_provider": provider,
            "operation_spans": False,
            "metrics": False,
            "logs": False,
        },
    )
    app.state.repository, app.state.engine, app.state.stopping = repository, engine, False
    by_name = {operation.name: operation for operation in OPERATIONS}
    add_direct_routes(app, by_name, context)
    add_routers(app, by_name, context, engine, control)
    add_access_control(app, settings, problems.respond, telemetry.refused, shared_folder)
    add_error_handlers(app)
    add_middleware(app, settings)
    return app


def make_engine(settings: Settings, telemetry: Telemetry, on_failure: Callable[[], None] | None) -> Engine:
    """Make the batchers, as the settings want them.

    Args:
        settings: The settings of the service.
        telemetry: Counts batches.
        on_failure: Called when the engine accepts no more work.
    """
    return Engine(
        max_rows=settings.max_rows,
        queue_rows=settings.queue_rows,
        linger_ms=settings.linger_ms,
        inline_s=settings.inline_us / 1e6,
        tile_pixels=settings.tile_pixels,
        batch_limit_s=settings.batch_limit_s,
        observe=telemetry.batch,
        on_failure=on_failure,
    )


def lifespan_of(
    settings: Settings, engine: Engine, control: Control, offload: Offload, last: Callable[[], None] | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Make what surrounds the time in which an application serves: preparations before it, and an end of all work.

    Args:
        settings: The settings of the service.
        engine: Its batchers.
        control: Follows orders to load and unload.
        offload: Its threads.
        last: Called in a thread at the end of all work.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if settings.docs:
            app.openapi()  # takes a quarter of a second, which should delay no request
        settle()
        async with control.running():
            yield
        await engine.close()
        offload.close()
        if last:
            await asyncio.to_thread(last)

    return lifespan


def add_direct_routes(app: Application, operations: Mapping[str, Operation], context: Context) -> None:
    """Add what runs operations, without FastAPI's dependencies, at the paths of every face."""
    for operation in operations.values():
        for prefix, _ in PATHS:
            app.add_direct_route(f"{prefix}/{operation.name}", OperationApp(operation, context))
    for path in INFER_PATHS:
        app.add_direct_route(path, InferApp(operations, context))
    for name, function in FUNCTIONS.items():
        app.add_direct_route(f"/diffusers/{{model}}/{name}", function(context))
    if context.settings.page:
        app.add_direct_route("/page/models/{model}/preview", OperationApp(preview, context))


def add_routers(
    app: FastAPI, operations: Mapping[str, Operation], context: Context, engine: Engine, control: Control
) -> None:
    """Add what is asked for rarely, as plain FastAPI."""
    repository, settings = context.repository, context.settings
    for router in (
        v2.server_router(repository, engine),
        v2.models_router(context, engine, operations),
        v2.repository_router(context, control, operations),
        models_router(repository, OPERATIONS),
        readiness_router(repository, engine),
        card_router(repository),
        control_router(repository, control, settings),
        health_router(repository, engine),
        metrics_router(context.telemetry),
    ):
        app.include_router(router)
    if settings.docs:
        app.include_router(docs_router(app.openapi))
    if settings.page:
        app.include_router(page_router(settings))


def add_error_handlers(app: FastAPI) -> None:
    """Answer errors of routes as problems."""
    app.add_exception_handler(ServiceError, _service_problem)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(Exception, _service_problem)


def add_middleware(app: FastAPI, settings: Settings) -> None:
    """Add the middleware that the settings ask for; the last one added is outermost."""
    if settings.tracing:
        app.add_middleware(Named)
    if settings.access_log:
        app.add_middleware(AccessLog)
    app.add_middleware(RequestIds)
    if settings.root_path or settings.trusted_proxies:
        app.add_middleware(RootPath, root_path=settings.root_path, proxies=Proxies(settings.trusted_proxies))


def settle() -> None:
    """Prepare the process and its running event loop to serve."""
    process.freeze_garbage()
    process.shorten_switch_interval()
    # One thread runs small work in order; the default pool grows by chance to several threads that stay.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1, "beside"))


async def _service_problem(request: Request, error: Exception) -> Response:
    return problems.respond(error, request.scope["path"])


async def _http_problem(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method."""
    assert isinstance(error, HTTPException)
    path, headers = request.scope["path"], dict(error.headers or {})
    if error.status_code == NOT_FOUND and (place := _without_slash(request)):
        return Response(status_code=307, headers={"location": place})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"
    codes = {
        404: ("not_found", f"nothing is at {path[:MAX_QUOTED]}; see /docs"),
        405: ("method_not_allowed", f"{path[:MAX_QUOTED]} takes {headers.get('Allow')}; see /docs"),
    }
    code, detail = codes.get(error.status_code, ("http_error", str(error.detail)))
    content, media_type = problems.problem(error.status_code, code, detail, path)
    return Response(content, error.status_code, headers, media_type)


def _without_slash(request: Request) -> str:
    """Return the relative path of the resource that was requested with a slash at the end; empty if there is none.

    A relative path stays valid for any host name of the service and any path prefix of a proxy.
    """
    scope = request.scope
    path, raw_path = scope["path"], scope.get("raw_path") or quote(scope["path"]).encode()
    if not path.endswith("/") or not raw_path.endswith(b"/"):
        return ""
    shorter = {"type": "http", "method": scope["method"], "path": path[:-1]}
    if all(route.matches(shorter)[0] is Match.NONE for route in request.app.router.routes):
        return ""
    query = scope["query_string"].decode("latin-1")
    return f"../{raw_path.decode('latin-1').split('/')[-2]}" + (f"?{query}" if query else "")
