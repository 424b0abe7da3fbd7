"""Endpoints, one a file; a new operation is one file and one line here."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import FastAPI

from service.api import problems
from service.api.invoke import Context
from service.api.v1.route import OperationRoute, endpoint
from service.codecs import CODECS, JSON
from service.codecs.codec import EventForm
from service.operations.decode import decode
from service.operations.denoise import denoise
from service.operations.encode import encode
from service.operations.inpaint import inpaint
from service.operations.interpolate import interpolate
from service.operations.operation import Operation
from service.operations.reconstruct import reconstruct
from service.operations.sample import sample
from service.operations.score import score
from service.operations.super_resolve import super_resolve
from service.operations.traverse import traverse

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


FILES = {
    name: {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1, "description": text}
    for name, text in (
        ("file", "pictures of one size, or .npy files; each is one or more rows"),
        (
            "mask",
            "a picture, black or transparent where a pixel is missing, or an .npy: one for all rows, or one a row",
        ),
    )
}
"""Of a form."""


def _bodies(operation: Operation) -> dict[str, Any]:
    """The request body for OpenAPI, in every form that the operation reads."""
    options = operation.options.model_json_schema().get("properties", {})
    forms: dict[str, Any] = {
        "application/json": {"schema": _object(operation), "example": operation.example},
    }
    if not operation.takes:
        schema = {"type": "object", "properties": options, "additionalProperties": False}
        forms |= {codec.media_type: {"schema": schema} for codec in CODECS if codec.options and codec is not JSON}
        return {"requestBody": {"required": False, "content": forms}}
    for codec in CODECS:
        fits = operation.takes == "images" or not codec.media_type.startswith("image/")
        if codec.read and codec.schema and fits:
            forms[codec.media_type] = {"schema": codec.schema}
    files = {name: FILES[name] for name in ("file", "mask") if name == "file" or operation.observed}
    form_schema = {"type": "object", "required": ["file"], "properties": {**files, **options}}
    forms["multipart/form-data"] = {"schema": {**form_schema, "additionalProperties": False}}
    return {"requestBody": {"required": True, "content": forms}}


def _headers(operation: Operation) -> dict[str, Any]:
    """The option that may also be said in a header."""
    option = operation.options.model_fields.get("fingerprint")
    if option is None:
        return {}
    named = {"name": "X-Fingerprint", "in": "header", "required": False}
    return {"parameters": [{**named, "schema": {"type": "string"}, "description": option.description}]}


ARRAYS = {
    "images": "Rows as nested numbers in [0, 1], (n, c, h, w), (n, h, w, c) or, if grey, (n, h, w) or (h, w), "
    "or base64 strings of PNG, JPEG, WebP or BMP files",
    "latents": "Rows as nested numbers, of the model's latent shape",
    "mask": "1 where a pixel is seen, 0 where it is missing: one for all images or one an image",
}


def _object(operation: Operation) -> dict[str, Any]:
    schema = operation.options.model_json_schema()
    names = [*([operation.takes] if operation.takes else []), *(["latents"] if operation.or_latents else [])]
    names += ["mask"] if operation.observed else []
    arrays = {name: {"type": "array", "items": {}, "minItems": 1, "description": ARRAYS[name]} for name in names}
    return {
        "type": "object",
        "required": [operation.takes] if operation.takes and not operation.or_latents else [],
        "properties": {**arrays, **schema.get("properties", {})},
        "additionalProperties": False,
    }


NOTES = {
    "type": "array",
    "description": "What is special about some rows; absent where nothing is",
    "items": {
        "type": "object",
        "required": ["code", "rows", "detail"],
        "properties": {
            "code": {"type": "string", "description": "stable: nothing_seen, level_clipped, grey_levels"},
            "rows": {"type": "array", "items": {"type": "integer"}},
            "detail": {"type": "string"},
        },
    },
}


def _answer(operation: Operation) -> dict[str, Any]:
    """What a JSON answer always has, and of which type its fields are."""
    types = {list: "array", int: "integer", str: "string"}
    fields = {name: {"type": types[type(value)]} for name, value in operation.answer.items()}
    about = {"model": {"type": "string"}, "version": {"type": "string"}}
    return {"type": "object", "required": [*about], "properties": {**about, **fields, "notes": NOTES}}


def _answers(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {JSON.media_type: {"schema": _answer(operation), "example": operation.answer}}
    for codec in CODECS:
        fits = "images" in operation.answer or not codec.media_type.startswith("image/")
        if codec.write and codec.schema and fits:
            example = {"example": _told(operation, codec.events)} if codec.events else {}
            content[codec.media_type] = {"schema": codec.schema, **example}
    return {"description": "The answer, in the form that Accept asks for", "content": content}


def _told(operation: Operation, form: EventForm) -> str:
    """An example of a whole stream."""
    events = [*([("progress", operation.progress)] if operation.progress else []), ("answer", operation.answer)]
    return b"".join(form.frame(kind, orjson.dumps(content)) for kind, content in events).decode()
