"""The route class that serves an operation: FastAPI documents it, a lean ASGI function answers it.

The call does not go through FastAPI's middleware, routing and dependency solver, which cost more than the inference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Annotated, Any

from fastapi import Path as PathParameter
from fastapi import Query, Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.invoke import Context
from service.api.v1.endpoint import OperationApp
from service.operations.operation import Operation

LONGEST_PATH = 256
"""Longer ones are nobody's, and are not remembered."""


class OperationRoute(APIRoute):
    """Documents the endpoint as FastAPI does, serves it as the endpoint's `operation_app` does."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.app = endpoint.operation_app  # type: ignore[attr-defined]


class Shortcut:
    """Operations answered at once, everything else by `app`: the framework's way to a route costs half a request.

    Paths are matched by the routes themselves, once each.
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


def endpoint(operation: Operation, context: Context, path_names: tuple[str, ...]) -> Callable[..., Any]:
    """A function with the signature that FastAPI documents, carrying the application that serves it."""

    async def documented(**_: Any) -> Response:
        raise AssertionError("served by OperationApp")

    keyword = inspect.Parameter.KEYWORD_ONLY
    help_texts = {"model": "Name of a model, see /v1/models", "version": "One of its versions"}
    parameters = [
        inspect.Parameter(name, keyword, annotation=Annotated[str, PathParameter(description=help_texts[name])])
        for name in path_names
    ]
    parameters.append(inspect.Parameter("options", keyword, annotation=Annotated[operation.options, Query()]))
    documented.__signature__ = inspect.Signature(parameters, return_annotation=Response)  # type: ignore[attr-defined]
    documented.operation_app = OperationApp(operation, context)  # type: ignore[attr-defined]
    return documented
