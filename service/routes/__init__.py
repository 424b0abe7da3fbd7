"""Endpoints, one a file; a new operation is one file and one line here."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import FastAPI

from service import problems
from service.codecs import EVENTS, READERS, WRITERS
from service.endpoint import Context
from service.operation import Operation
from service.route import OperationRoute, endpoint
from service.routes.decode import decode
from service.routes.denoise import denoise
from service.routes.encode import encode
from service.routes.inpaint import inpaint
from service.routes.interpolate import interpolate
from service.routes.reconstruct import reconstruct
from service.routes.sample import sample
from service.routes.score import score
from service.routes.super_resolve import super_resolve
from service.routes.traverse import traverse

OPERATIONS = (encode, decode, reconstruct, denoise, inpaint, super_resolve, score, sample, interpolate, traverse)
"""In the order of the documentation."""

PATHS = (
    ("/v1/models/{model}/versions/{version}", ("model", "version")),
    ("/v1/models/{model}", ("model",)),
    ("/v1", ()),
)


def add_operations(app: FastAPI, context: Context) -> None:
    """Every operation for the default model, for a named one, and for a version of it."""
    for prefix, path_names in reversed(PATHS):
        for operation in OPERATIONS:
            app.router.add_api_route(
                f"{prefix}/{operation.name}",
                endpoint(operation, context, path_names),
                methods=["POST"],
                route_class_override=OperationRoute,
                operation_id="_".join((operation.name, *path_names)),
                summary=operation.summary,
                description=operation.description,
                tags=[operation.name],
                responses={200: _answers(operation), **problems.documented()},
                openapi_extra={**_bodies(operation), **_headers(operation)},
            )


STREAM = (
    "Events, each a JSON object: `progress` as long work goes on, then `answer` with the fields of the JSON answer, or "
    "`error` with those of a problem where something goes wrong after the first event."
)


def _bodies(operation: Operation) -> dict[str, Any]:
    """The request body for OpenAPI, in every form that the operation reads."""
    forms: dict[str, Any] = {
        "application/json": {"schema": _object(operation), "example": operation.example},
    }
    if operation.takes:
        pictures = [form for form in READERS if form.startswith("image/")] if operation.takes == "images" else []
        for form in ("application/x-npy", "application/octet-stream", *pictures):
            forms[form] = {"schema": {"type": "string", "format": "binary"}}
        file = {"type": "string", "format": "binary", "description": "a picture or an .npy file"}
        form_schema = {"type": "object", "required": ["file"], "properties": {"file": file}}
        forms["multipart/form-data"] = {"schema": form_schema}
    return {"requestBody": {"required": operation.takes is not None, "content": forms}}


def _headers(operation: Operation) -> dict[str, Any]:
    """The option that may also be said in a header."""
    option = operation.options.model_fields.get("fingerprint")
    if option is None:
        return {}
    named = {"name": "X-Fingerprint", "in": "header", "required": False}
    return {"parameters": [{**named, "schema": {"type": "string"}, "description": option.description}]}


def _object(operation: Operation) -> dict[str, Any]:
    schema = operation.options.model_json_schema()
    properties = dict(schema.get("properties", {}))
    if operation.takes:
        names = [operation.takes, *(["latents"] if operation.or_latents else [])]
        properties = {**{name: {"type": "array", "items": {}} for name in names}, **properties}
        return {
            "type": "object",
            "required": [] if operation.or_latents else names,
            "properties": properties,
            "additionalProperties": False,
        }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _answers(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"example": operation.answer}}
    pictures = "images" in operation.answer
    for form in WRITERS:
        if form in EVENTS:
            content[form] = {"schema": {"type": "string", "description": STREAM}, "example": _told(operation, form)}
        elif form != "application/json" and (pictures or not form.startswith("image/")):
            content[form] = {"schema": {"type": "string", "format": "binary"}}
    return {"description": "The answer, in the form that Accept asks for", "content": content}


def _told(operation: Operation, form: str) -> str:
    """An example of a whole stream."""
    events = [*([("progress", operation.progress)] if operation.progress else []), ("answer", operation.answer)]
    return b"".join(EVENTS[form].frame(kind, orjson.dumps(content)) for kind, content in events).decode()
