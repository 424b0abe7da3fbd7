"""The application: one repository, one engine, the routes."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from service import __version__, problems
from service.config import Settings, read_settings
from service.endpoint import Context
from service.engine import Engine
from service.errors import ServiceError
from service.memory import Memory
from service.repository import Repository
from service.route import Shortcut
from service.routes import OPERATIONS, add_operations
from service.routes.health import health_router
from service.routes.metrics import metrics_router
from service.routes.models import models_router
from service.session import cpu_count, execution_provider

SWITCH_S = 3e-4
"""How soon the event loop makes room for the thread that computes; Python's 5 ms let it stand idle for a fifth."""


class Service(FastAPI):
    """FastAPI, with a shortcut to the operations inside whatever middleware is added."""

    def build_middleware_stack(self) -> ASGIApp:
        """Added middleware, then the shortcut, then FastAPI's own."""
        added, self.user_middleware = self.user_middleware, []
        app: ASGIApp = Shortcut(super().build_middleware_stack(), self.router.routes)
        self.user_middleware = added
        for middleware in reversed(added):
            app = middleware.cls(app, *middleware.args, **middleware.kwargs)
        return app


def open_repository(settings: Settings) -> Repository:
    """Every model checked, opened and warmed.

    Raises: StartError.
    """
    provider = execution_provider(settings.execution_provider)
    threads = settings.threads or max(1, cpu_count() // settings.workers)
    return Repository.open(settings.models, settings.default_model, provider, threads, settings.max_rows)


def create_app(
    settings: Settings, repository: Repository | None = None, on_failure: Callable[[], None] | None = None
) -> FastAPI:
    """The whole service around a repository (None opens the one that the settings name).

    on_failure: called where the engine takes no more work.
    Raises: StartError.
    """
    repository = repository or open_repository(settings)
    engine = Engine(settings, on_failure)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        settle()
        yield
        await engine.close()

    app = Service(
        title="VAE service",
        version=__version__,
        summary="Variational auto-encoders over HTTP: encode, decode, reconstruct, restore, sample.",
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # asked for at every request; ours is /metrics
    )
    add_operations(app, Context(settings, repository, engine, Memory(settings.memory_bytes)))
    for router in (
        models_router(repository, OPERATIONS),
        health_router(repository, engine),
        metrics_router(engine.telemetry),
    ):
        app.include_router(router)
    app.add_exception_handler(ServiceError, _service_problem)
    app.add_exception_handler(HTTPException, _http_problem)
    return app


def create_worker_app() -> FastAPI:
    """The service of one of several worker processes; settings come by the environment."""
    return create_app(read_settings(), on_failure=end_process)


def end_process() -> None:
    """As if an operator asked for it: who can still be answered is."""
    signal.raise_signal(signal.SIGTERM)


def settle() -> None:
    """The interpreter made ready to serve."""
    gc.collect()
    gc.freeze()  # what was made at the start is never garbage, and looking through it stops everybody for long
    sys.setswitchinterval(SWITCH_S)


async def _service_problem(_request: Request, error: Exception) -> Response:
    status, _, content, headers = problems.describe(error)
    return Response(content, status, headers, problems.MEDIA_TYPE)


async def _http_problem(request: Request, error: Exception) -> Response:
    """Paths and methods that nobody serves."""
    assert isinstance(error, HTTPException)
    codes = {
        404: ("not_found", f"nothing is at {request.url.path}; see /docs"),
        405: ("method_not_allowed", "see /docs"),
    }
    code, detail = codes.get(error.status_code, ("http_error", str(error.detail)))
    content = problems.problem(error.status_code, code, detail)
    return Response(content, error.status_code, error.headers, problems.MEDIA_TYPE)
