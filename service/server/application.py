"""FastAPI with direct routes, which an ASGI application answers without FastAPI's overhead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any

from fastapi import FastAPI, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

MAX_PATH_CHARACTERS = 256
"""Longer paths match no direct route, so they never enter the cache of matches."""


class Application(FastAPI):
    """FastAPI with direct routes, which skip FastAPI's routing and dependency solver.

    Middleware from `add_middleware` runs around every route, direct or not.

    Args:
        respond: Gives the response for an error that is raised outside of any route, by the path of the request.
        wrap: Puts middleware around everything but the direct routes.
        document: Completes the OpenAPI document of FastAPI's routes with the direct ones.
        **options: Options of FastAPI.
    """

    def __init__(
        self,
        respond: Callable[[Exception, str], Response],
        wrap: Callable[[ASGIApp], ASGIApp],
        document: Callable[[dict[str, Any]], dict[str, Any]],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.respond = respond
        self._wrap, self._document = wrap, document
        self._direct: list[Route] = []
        self._traced = bool(options.get("telemetry", {}).get("tracing"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the lifespan of the application; without FastAPI's part where nothing is traced."""
        if scope["type"] == "http" and not self._traced and self.middleware_stack is not None:
            scope["app"] = self
            await self.middleware_stack(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def add_direct_route(self, path: str, serve: ASGIApp) -> None:
        """Let `serve` answer POST at `path`, which may have parameters in braces."""
        route = Route(path, serve, methods=["POST"])
        self.router.routes.append(route)
        self._direct.append(route)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document of all routes."""
        if self.openapi_schema is None:
            self.openapi_schema = self._document(super().openapi())
        return self.openapi_schema

    def build_middleware_stack(self) -> ASGIApp:
        """Build the added middleware around the direct routes, and FastAPI's own middleware behind them."""
        added, self.user_middleware = self.user_middleware, []
        app: ASGIApp = DirectRoutes(self._wrap(super().build_middleware_stack()), self._direct)
        self.user_middleware = added
        for middleware in reversed(added):
            app = middleware.cls(app, *middleware.args, **middleware.kwargs)
        return app


class DirectRoutes:
    """ASGI middleware that answers direct routes at once and passes every other request on.

    FastAPI's own dispatch costs more than the inference. Each path is matched by its route once, then cached.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[Route]) -> None:
        self._app = app
        self._routes = routes
        self._find = lru_cache(1024)(self._match)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Handle one request, or the lifespan of the application. Not a coroutine itself, which saves time."""
        app = self._app
        if scope["type"] == "http" and scope["method"] == "POST" and len(scope["path"]) <= MAX_PATH_CHARACTERS:
            app, scope["path_params"] = self._find(scope["path"])
        return app(scope, receive, send)

    def _match(self, path: str) -> tuple[ASGIApp, dict[str, Any]]:
        for route in self._routes:
            match, found = route.matches({"type": "http", "method": "POST", "path": path})
            if match is Match.FULL:
                return route.app, found["path_params"]
        return self._app, {}
