"""The OpenAPI document of the operations, derived from their declarations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from service.api import problems
from service.api.examples import body_examples, references
from service.codecs import CODECS, JSON
from service.codecs.codec import EventForm
from service.operations.examples import OTHER, PICTURE, SMALL
from service.operations.operation import Operation, Tensor

Schema = dict[str, Any]

PATHS = (
    ("/v1", ()),
    ("/v1/models/{model}", ("model",)),
    ("/v1/models/{model}/versions/{version}", ("model", "version")),
)
"""Prefixes of every operation, with the names of their parameters."""
PARAMETERS = {"model": "Name of a model, see /v1/models", "version": "One of its versions"}
BINARY: Schema = {"type": "string", "format": "binary"}
NULL: Schema = {"type": "null"}
FORM_NAMES = {"multipart/form-data": "Form", "application/x-www-form-urlencoded": "Fields"}
"""Suffix of a form's schema, by media type."""
ELEMENTS = {"float32": "number", "int64": "integer", "string": "string"}
"""JSON types of the elements of a tensor."""
LATENT_AXES = (1, 3)
"""Axes of a latent: a vector, or channels, height and width."""
FILES: dict[str, Schema] = {
    name: {"type": "array", "items": BINARY, "minItems": 1, "description": text}
    for name, text in (
        ("file", "Pictures of one size, or .npy files; each is one or more rows"),
        ("mask", "A picture, black or transparent where a pixel is missing, or .npy: one for all rows, or one a row"),
    )
}
"""Fields of a form that hold files."""
FILE_NAMES = {PICTURE: "digit.png", OTHER: "other.png", SMALL: "small.png"}
"""What examples of forms call the pictures of those in JSON."""


def _nested(axes: int, of: str = "number") -> Schema:
    """Arrays in arrays, `axes` deep."""
    return {"type": "array", "items": _nested(axes - 1, of)} if axes else {"type": of}


# Generated Python clients pass the first form of each `anyOf` through unchanged.
ARRAYS: dict[str, Schema] = {
    "images": {
        "anyOf": [{**_nested(1, "string"), "minItems": 1}, *map(_nested, (2, 3, 4)), {"type": "string"}],
        "description": "Rows as nested numbers, (n, channels, height, width), (n, height, width, channels) or, if "
        "grey, (n, height, width) or (height, width); or base64 strings of PNG, JPEG, WebP or BMP files. All of one "
        "size: the model's, or any for a model with a `size`, see /v1/models",
    },
    "latents": {
        "anyOf": [*map(_nested, (1, 2, 3, 4))],
        "description": "Rows as nested numbers, of the model's latent shape, whose height and width are free where "
        "those of images are",
    },
    "mask": {
        "anyOf": [*map(_nested, (2, 3, 4))],
        "description": "1 where a pixel is seen, 0 where it is missing: one for all images or one an image",
    },
}
"""Arrays of a request in JSON, by name."""
NOTE: Schema = {
    "type": "object",
    "required": ["code", "rows", "detail"],
    "properties": {
        "code": {
            "type": "string",
            "description": "Stable: nothing_seen, level_clipped, grey_levels, tiled or far_from_training",
        },
        "rows": {"type": "array", "items": {"type": "integer"}, "description": "Indices of rows in the request"},
        "detail": {"type": "string", "description": "For people"},
    },
}
ABOUT: dict[str, Schema] = {
    "model": {"type": "string", "description": "Name of the model"},
    "version": {"type": "string", "description": "Version of the model"},
    "fingerprint": {"type": "string", "description": "Identity of the model's weights"},
}
"""Fields of every answer."""


def with_operations(document: dict[str, Any], operations: Iterable[Operation]) -> dict[str, Any]:
    """Add the paths and schemas of the operations to an OpenAPI document.

    Args:
        document: The document of all other routes.
        operations: The operations.

    Returns:
        A new document.
    """
    operations, components = tuple(operations), document.get("components", {})
    schemas = {_title(name): schema for name, schema in ARRAYS.items()} | {"Note": NOTE, "Problem": problems.SCHEMA}
    for operation in operations:
        schemas |= _schemas(operation)
    keys: list[dict[str, list[str]]] = [{name: []} for name in components.get("securitySchemes", ())]
    paths = {
        f"{prefix}/{operation.name}": {"post": _post(operation, names) | ({"security": keys} if keys else {})}
        for prefix, names in PATHS
        for operation in operations
    }
    components = {**components, "schemas": {**components.get("schemas", {}), **schemas}}
    components["examples"] = {**problems.examples(), **body_examples(operations)}
    return without_validation({**document, "paths": {**paths, **document["paths"]}, "components": components})


def without_validation(document: dict[str, Any]) -> dict[str, Any]:
    """Remove the answer that FastAPI documents for every path with parameters.

    These are strings, so nothing can be wrong with them, and all refusals are problems.
    """
    for methods in document["paths"].values():
        for operation in methods.values():
            refused = operation["responses"].get("422", {}).get("content", {})
            if "HTTPValidationError" in str(refused):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document


def _post(operation: Operation, names: tuple[str, ...]) -> dict[str, Any]:
    """The path item of one operation; `names` are the parameters of the path."""
    return {
        "tags": [operation.name],
        "summary": operation.summary,
        "description": operation.description,
        "operationId": "_".join((operation.name, *names)),
        "parameters": [*_in_path(names), *_in_query(operation), *_in_headers(operation)],
        "requestBody": {"required": bool(operation.inputs), "content": _bodies(operation)},
        "responses": {
            "200": {"description": "The answer, in the form that Accept asks for", "content": _answers(operation)},
            **{str(status): problem for status, problem in problems.documented().items()},
        },
    }


def _in_path(names: tuple[str, ...]) -> list[Schema]:
    return [
        {"name": name, "in": "path", "required": True, "description": PARAMETERS[name], "schema": {"type": "string"}}
        for name in names
    ]


def _in_query(operation: Operation) -> list[Schema]:
    """The options as query parameters. A query string has no null, so null is removed from their types."""
    found = []
    for name, option in _options(operation)[0].items():
        description, forms = option.pop("description"), [form for form in option.pop("anyOf", ()) if form != NULL]
        schema = option | ({"anyOf": forms} if len(forms) > 1 else forms[0] if forms else {})
        found.append({"name": name, "in": "query", "required": False, "description": description, "schema": schema})
    return found


def _in_headers(operation: Operation) -> list[Schema]:
    """The header X-Fingerprint, for operations with the option `fingerprint`."""
    option = operation.options.model_fields.get("fingerprint")
    if option is None:
        return []
    named = {"name": "X-Fingerprint", "in": "header", "required": False}
    return [{**named, "description": option.description, "schema": {"type": "string"}}]


def _bodies(operation: Operation) -> dict[str, Any]:
    """The request body by media type, for every format that the operation reads."""
    name = _title(operation.name)
    bodies: dict[str, Any] = {
        "application/json": {"schema": _reference(f"{name}Request"), "example": operation.example},
    }
    if not operation.inputs:
        forms = [codec.media_type for codec in CODECS if codec.options and codec is not JSON]
        return bodies | {
            form: {"schema": _reference(name + FORM_NAMES[form]), "example": operation.example} for form in forms
        }
    for codec in CODECS:
        if codec.read and codec.schema and (examples := references(operation, "request", codec)):
            bodies[codec.media_type] = {"schema": codec.schema, "examples": examples}
    return bodies | {"multipart/form-data": {"schema": _reference(f"{name}Form"), "example": _form(operation)}}


def _form(operation: Operation) -> dict[str, Any]:
    """An example of a form: names in place of its files, and the options of the example in JSON."""
    first, *_ = operation.inputs
    rows = operation.example[first.name]
    names = [FILE_NAMES.get(row, "picture.png") if isinstance(row, str) else "latents.npy" for row in rows]
    files = {"file": names} | ({"mask": ["mask.png"]} if operation.masked else {})
    return files | {key: value for key, value in operation.example.items() if key in operation.options.model_fields}


def _answers(operation: Operation) -> dict[str, Any]:
    """The answer by media type, for every format that can hold it."""
    answer = _reference(f"{_title(operation.name)}Answer")
    content: dict[str, Any] = {"application/json": {"schema": answer, "example": _answer(operation)}}
    pictures = "images" in (tensor.name for tensor in operation.outputs)
    for codec in CODECS:
        if codec.write and codec.schema and (pictures or not codec.media_type.startswith("image/")):
            content[codec.media_type] = {"schema": codec.schema} | (
                {"example": _stream(operation, codec.events)}
                if codec.events
                else {"examples": references(operation, "answer", codec)}
            )
    return content


def _answer(operation: Operation) -> Schema:
    """An example of an answer in JSON, with the fields that every answer has."""
    return {"model": "mnist", "version": "3", "fingerprint": "0123456789abcdef", **operation.answer}


def _stream(operation: Operation, form: EventForm) -> str:
    """An example of a stream of events."""
    events = [*([("progress", operation.progress)] if operation.progress else []), ("answer", _answer(operation))]
    return b"".join(form.frame(kind, orjson.dumps(content)) for kind, content in events).decode()


def _schemas(operation: Operation) -> dict[str, Schema]:
    """The named schemas of an operation: its request, its forms, its answer."""
    name, (options, words) = _title(operation.name), _options(operation)
    arrays = {tensor.name: _reference(_title(tensor.name)) for tensor in operation.inputs}
    request = _object({**arrays, **options}, [tensor.name for tensor in operation.inputs if tensor.required])
    files = {field: FILES[field] for field in ("file", "mask") if field == "file" or operation.observed}
    forms = (
        {f"{name}Form": _object({**files, **options}, ["file"])}
        if operation.inputs
        else {name + ending: _object(options, []) for ending in FORM_NAMES.values()}
    )
    outputs = {tensor.name: _output(tensor) for tensor in operation.outputs}
    notes = {
        "type": "array",
        "items": _reference("Note"),
        "description": "What is special about some rows, if anything",
    }
    answer = {
        "type": "object",
        "required": [*ABOUT, *(tensor.name for tensor in operation.outputs if tensor.required)],
        "properties": {**ABOUT, **outputs, "notes": notes},
    }
    return {**words, f"{name}Request": request, **forms, f"{name}Answer": answer}


def _object(properties: dict[str, Schema], required: list[str]) -> Schema:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _options(operation: Operation) -> tuple[dict[str, Schema], dict[str, Schema]]:
    """The options by name, and named schemas of options with an enumeration.

    The description contains the default, because a key `default` makes the option required in generated TypeScript.
    """
    options: dict[str, Schema] = {}
    words: dict[str, Schema] = {}
    for name, known in operation.options.model_json_schema().get("properties", {}).items():
        title, default = _title(operation.name) + _title(name), known.pop("default", None)
        forms = known.pop("anyOf", [{key: known.pop(key) for key in ("type", "enum") if key in known}])
        for form in forms:
            if "enum" in form:
                words[title] = form
        forms = [_reference(title) if "enum" in form else form for form in forms]
        told = known["description"].replace("\n", " ")
        told += "" if default is None else f" Default: {orjson.dumps(default).decode()}."
        rest = {key: value for key, value in known.items() if key not in ("title", "description")}
        options[name] = rest | {"description": told} | ({"anyOf": forms} if len(forms) > 1 else forms[0])
    return options, words


def _output(tensor: Tensor) -> Schema:
    """A tensor of an answer, as nested arrays."""
    described = {"description": f"{tensor.meaning}, ({', '.join(tensor.shape)})" if tensor.shape else tensor.meaning}
    axes, element = len(tensor.shape), ELEMENTS[tensor.dtype]
    if "latent" not in tensor.shape:
        return {**_nested(axes, element), **described}
    return {"anyOf": [_nested(axes - 1 + further, element) for further in LATENT_AXES], **described}


def _title(name: str) -> str:
    """`super-resolve` as the name of a schema, `SuperResolve`."""
    return "".join(part.capitalize() for part in name.split("-"))


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
