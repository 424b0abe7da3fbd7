"""`GET /health/live` and `/health/ready`: whether the process is alive, and whether it should get requests."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service.api.problems import documented
from service.errors import NotReady
from service.operations.examples import example
from service.repository.repository import Repository
from service.runtime.scheduler import Engine

READY = {**example({"ready": True, "models": ["mnist"]}), **documented(NotReady)}


def health_router(repository: Repository, engine: Engine) -> APIRouter:
    """Make the health routes.

    Args:
        repository: The models of this worker.
        engine: Its batchers.
    """
    router = APIRouter(prefix="/health", tags=["health"])

    @router.get("/live", summary="Whether the process answers", responses=example({"live": True}))
    async def live() -> dict[str, bool]:
        return {"live": True}

    @router.get("/ready", summary="Whether the default models are served and the engine runs", responses=READY)
    async def ready(request: Request) -> Response:
        check_ready(repository, engine, stopping=request.app.state.stopping)
        failed = [line for name in repository.conditions for line in _refused(repository, name)]
        return JSONResponse(
            {"ready": True, "models": list(repository.models), **({"failed": failed} if failed else {})}
        )

    return router


def check_ready(repository: Repository, engine: Engine, *, stopping: bool) -> None:
    """Check that the service should get requests.

    Args:
        repository: The models of this worker.
        engine: Its batchers.
        stopping: Whether the process is about to end.

    Raises:
        NotReady: It should not; the message has the reason.
    """
    if stopping:
        raise NotReady("the service is stopping; ask another replica")
    if not engine.healthy:
        raise NotReady("the engine has stopped")
    for name in repository.defaults.models:
        if name not in repository.models:
            loading = repository.loading(name).items()
            why = "".join(f"; {line}" for line in _refused(repository, name))
            why += "".join(f"; version {version} is loading: {step}" for version, step in loading)
            raise NotReady(f"no version of the default model {name} is served{why}")


def _refused(repository: Repository, name: str) -> list[str]:
    return [f"{name}:{version}: {reason}" for version, reason in repository.refused(name).items()]
