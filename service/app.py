"""The application: one repository, one engine, the routes."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp

from service import __version__
from service.api import problems
from service.api.admin.control import control_router
from service.api.admin.docs import docs_router
from service.api.admin.health import health_router
from service.api.admin.metrics import metrics_router
from service.api.admin.models import models_router, readiness_router
from service.api.invoke import Context
from service.api.memory import Memory
from service.api.offload import Offload
from service.api.v1.route import Shortcut
from service.api.v1.routes import OPERATIONS, add_operations
from service.contract.cores import cpu_count
from service.errors import ServiceError
from service.observability.metrics import SHARED_FOLDER
from service.observability.requests import AccessLog, Tracking
from service.observability.tracing import Named, TracedEngine, finish, tracer_provider
from service.repository.model import LoadLimits
from service.repository.overrides import Orders, Standing
from service.repository.reload import Control
from service.repository.remote import local_copy
from service.repository.repository import Repository
from service.runtime.scheduler import Engine
from service.runtime.session import execution_provider
from service.security.middleware import add_doors
from service.security.proxies import Proxies
from service.security.security_headers import PageHeaders
from service.selection import Selection
from service.server.methods import Methods, RootPath
from service.settings import Settings

NOT_FOUND = 404
LONGEST_TOLD = 100
"""Characters of a path that an error repeats."""
SWITCH_S = 3e-4
"""How soon the event loop makes room for the thread that computes; Python's 5 ms let it stand idle for a fifth."""


class Service(FastAPI):
    """FastAPI, with a shortcut to the operations inside whatever middleware is added."""

    def build_middleware_stack(self) -> ASGIApp:
        """Added middleware, then the shortcut, then FastAPI's own."""
        added, self.user_middleware = self.user_middleware, []
        app: ASGIApp = Shortcut(PageHeaders(Methods(super().build_middleware_stack())), self.router.routes)
        self.user_middleware = added
        for middleware in reversed(added):
            app = middleware.cls(app, *middleware.args, **middleware.kwargs)
        return app


def open_repository(settings: Settings, standing: Standing = Standing()) -> Repository:  # noqa: B008  # a tuple
    """What the setting and the orders that stand want, fetched if need be, checked, opened and warmed.

    Raises: StartError.
    """
    provider = execution_provider(settings.execution_provider)
    threads = settings.threads or max(1, cpu_count() // settings.workers)
    models, selection = local_copy(settings), Selection(settings.versions)
    limits = LoadLimits(settings.load_limit_s, settings.load_memory_bytes)
    return Repository.open(
        models, settings.default_model, provider, threads, settings.max_rows, selection, standing, limits
    )


def create_app(
    settings: Settings, repository: Repository | None = None, on_failure: Callable[[], None] | None = None
) -> FastAPI:
    """The whole service around a repository (None opens the one that the settings name).

    on_failure: called where the engine takes no more work.
    Raises: StartError.
    """
    orders = Orders(Path(os.environ[SHARED_FOLDER]) if settings.workers > 1 and SHARED_FOLDER in os.environ else None)
    repository = repository or open_repository(settings, orders.read())
    provider = tracer_provider() if settings.tracing else None
    engine = TracedEngine(settings, provider, on_failure) if provider else Engine(settings, on_failure)
    control = Control(repository, orders, settings, engine.telemetry)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if settings.docs:
            app.openapi()  # takes a quarter of a second, which no request should wait for
        settle()
        async with control.running():
            yield
        await engine.close()
        offload.close()
        if provider:
            await asyncio.to_thread(finish, provider)

    app = Service(
        title="VAE service",
        version=__version__,
        summary="Variational auto-encoders over HTTP: encode, decode, reconstruct, restore, sample.",
        lifespan=lifespan,
        openapi_url=None,  # the documentation is ours, in routes/docs.py
        redirect_slashes=False,  # they go where the header Host says
        dependencies=[Depends(HTTPBearer(auto_error=False))] if settings.api_keys else [],  # told in OpenAPI
        # What is on is asked for at every request; metrics are ours, at /metrics.
        telemetry={
            "tracing": settings.tracing,
            "tracer_provider": provider,
            "operation_spans": False,
            "metrics": False,
            "logs": False,
        },
    )
    app.state.repository, app.state.stopping = repository, False
    offload = Offload(cpu_count())
    add_operations(app, Context(settings, repository, engine, Memory(settings.memory_bytes), offload))
    for router in (
        models_router(repository, OPERATIONS),
        readiness_router(repository, engine),
        control_router(repository, control, settings),
        health_router(repository, engine),
        metrics_router(engine.telemetry),
    ):
        app.include_router(router)
    if settings.docs:
        app.include_router(docs_router(app.openapi))
    add_doors(app, settings, engine.telemetry.refused)
    app.add_exception_handler(ServiceError, _service_problem)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(Exception, _service_problem)
    add_middleware(app, settings)
    return app


def add_middleware(app: FastAPI, settings: Settings) -> None:
    """What is around every request; the last one is outermost, and what is off is not there."""
    if settings.tracing:
        app.add_middleware(Named)
    if settings.access_log:
        app.add_middleware(AccessLog)
    app.add_middleware(Tracking)
    if settings.root_path or settings.trusted_proxies:
        app.add_middleware(RootPath, root_path=settings.root_path, proxies=Proxies(settings.trusted_proxies))


def settle() -> None:
    """The interpreter and its running loop made ready to serve."""
    gc.collect()
    gc.freeze()  # what was made at the start is never garbage, and looking through it stops everybody for long
    # Work beside the loop follows one thread's order; a pool would by chance grow to several that stay.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1, "beside"))
    sys.setswitchinterval(SWITCH_S)


async def _service_problem(_request: Request, error: Exception) -> Response:
    status, _, content, headers = problems.describe(error)
    return Response(content, status, headers, problems.MEDIA_TYPE)


async def _http_problem(request: Request, error: Exception) -> Response:
    """Paths and methods that nobody serves."""
    assert isinstance(error, HTTPException)
    path, headers = request.scope["path"], dict(error.headers or {})
    if error.status_code == NOT_FOUND and (place := _without_slash(request)):
        return Response(status_code=307, headers={"location": place})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"
    codes = {
        404: ("not_found", f"nothing is at {path[:LONGEST_TOLD]}; see /docs"),
        405: ("method_not_allowed", f"{path[:LONGEST_TOLD]} takes {headers.get('Allow')}; see /docs"),
    }
    code, detail = codes.get(error.status_code, ("http_error", str(error.detail)))
    content = problems.problem(error.status_code, code, detail)
    return Response(content, error.status_code, headers, problems.MEDIA_TYPE)


def _without_slash(request: Request) -> str:
    """Where to find what was asked for with a slash at the end, from there; empty where there is nothing.

    A relative place holds whatever the caller calls this host, and under which path a proxy serves it.
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
