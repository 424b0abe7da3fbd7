"""What FastAPI documents of an operation's routes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Path as PathParameter
from fastapi import Query, Response

from service.operations.operation import Operation


def endpoint(operation: Operation, path_names: tuple[str, ...]) -> Callable[..., Any]:
    """Make a function whose signature FastAPI documents. It is never called: the route is a direct one."""

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
    return documented
