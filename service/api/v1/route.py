"""Routes of the operations, and the shortcut to them past FastAPI.

A call does not pass FastAPI's middleware, routing and dependency solver: they cost more than the inference.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.v1.endpoint import Context, OperationApp
from service.api.v1.openapi import PATHS
from service.operations.operation import Operation

LONGEST_PATH = 256
"""Longer paths are of no operation, and are not remembered."""


class OperationRoute(Route):
    """A route of an operation. `with_operations` documents it."""


def operation_routes(operations: Iterable[Operation], context: Context) -> list[OperationRoute]:
    """Routes of every operation for the default model, for a named model, and for one version of it."""
    return [
        OperationRoute(f"{prefix}/{operation.name}", OperationApp(operation, context), methods=["POST"])
        for operation in operations
        for prefix, _ in PATHS
    ]


class Shortcut:
    """ASGI application that answers operations itself and passes everything else to `app`.

    The routes match each path once; the way to a route through the framework costs half a request.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = [route for route in routes if isinstance(route, OperationRoute)]
        self._find = lru_cache(1024)(self._match)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's start and stop."""
        if scope["type"] == "http" and scope["method"] == "POST" and len(scope["path"]) <= LONGEST_PATH:
            app, scope["path_params"] = self._find(scope["path"])
            await app(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _match(self, path: str) -> tuple[ASGIApp, dict[str, Any]]:
        for route in self._routes:
            match, found = route.matches({"type": "http", "method": "POST", "path": path})
            if match is Match.FULL:
                return route.app, found["path_params"]
        return self._app, {}
