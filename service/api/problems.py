"""Errors as bodies: RFC 9457 problem+json, or what the Open Inference Protocol has; alone in knowing status codes."""

from __future__ import annotations

import logging
import math
from typing import Any

import orjson
from fastapi import Response

from service import errors
from service.observability.request_ids import request_id

log = logging.getLogger(__name__)

MEDIA_TYPE, PLAIN_TYPE = "application/problem+json", "application/json"
PLAIN_PATHS = ("/v2", "/v2/")
"""The path, and beginning of paths, whose errors are `{"error": ...}`, as the Open Inference Protocol has them."""
INTERNAL = 500
CLIENT_CLOSED_REQUEST = 499  # nginx's; only the log sees it
CONTROL = (errors.ControlOff, errors.LoadRefused, errors.NoRoom)
"""Errors of loading and unloading alone."""
STATUS: dict[type[errors.ServiceError], int] = {
    errors.Malformed: 400,
    errors.Unreadable: 400,
    errors.ReaderFault: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.ControlOff: 403,
    errors.CrossSite: 403,
    errors.NotFound: 404,
    errors.UnknownModel: 404,
    errors.NotAcceptable: 406,
    errors.SlowRequest: 408,
    errors.LoadRefused: 409,
    errors.WrongModel: 409,
    errors.TooLarge: 413,
    errors.UrlTooLong: 414,
    errors.UnsupportedMediaType: 415,
    errors.UnknownHost: 421,
    errors.InvalidShape: 422,
    errors.InvalidValue: 422,
    errors.InvalidOption: 422,
    errors.UnsupportedOperation: 422,
    errors.RateLimited: 429,
    errors.HeadersTooLarge: 431,
    errors.CallerGone: CLIENT_CLOSED_REQUEST,
    errors.InferenceFailed: INTERNAL,
    errors.Overloaded: 503,
    errors.NotReady: 503,
    errors.NoRoom: 503,
    errors.TooManyConnections: 503,
    errors.DeadlinePassed: 504,
}
TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    406: "Not Acceptable",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    421: "Misdirected Request",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


DETAILS = {
    "malformed_request": "the header Content-Length is sent twice, with different values; send it once",
    "unreadable_body": 'the body is not JSON: unexpected end of data; send an object such as {"images": ...}',
    "unauthenticated": "there is no API key; send the header Authorization: Bearer <key>",
    "forbidden": "the key alice lacks the right control",
    "control_off": "loading and unloading models over HTTP is disabled; set VAE_MODEL_CONTROL=true to allow it",
    "cross_site": "a page of another origin sent the request; list its origin in VAE_CORS_ORIGINS to allow it",
    "not_found": 'the card has no file "photo.png"; its files are README.md, sheet.png',
    "unknown_model": 'there is no model "minst"; there are mnist, mnist-2d, mnist-ladder',
    "not_acceptable": "no form of this answer fits Accept: text/html; it can be application/json, application/x-npy",
    "slow_request": "the body did not arrive within 120 s (VAE_BODY_TIMEOUT_S); send it faster, or less of it",
    "load_refused": "mnist/4 does not match its manifest: decoder.onnx has another SHA-256; copy the version again",
    "wrong_model": "the latents are of 0123456789abcdef, but model mnist is fedcba9876543210; encode the images anew",
    "too_large": "the body is above 67108864 bytes (VAE_MAX_BODY_BYTES); send fewer rows",
    "url_too_long": "path and query have more than 8192 bytes (VAE_MAX_URL_BYTES); send options in the body",
    "unsupported_media_type": "no body of type text/plain is read; send application/json or application/x-npy",
    "unknown_host": "this service is not evil.example; VAE_ALLOWED_HOSTS adds names",
    "invalid_shape": "images are (1, 1, 28, 27), but model mnist takes (n, 1, 28, 28); fit=resize adapts them",
    "invalid_value": "images hold 1.5; numbers lie in [0, 1]",
    "invalid_option": "draws is -1; it must be 0 or more",
    "unsupported_operation": "model sd-vae cannot sample: it has no prior p(z); served models that can: mnist",
    "rate_limited": "the key alice allows 100 requests a minute; try again in 12 s",
    "headers_too_large": "the headers have more than 32768 bytes (VAE_MAX_HEADER_BYTES); send fewer",
    "inference_failed": "the batch failed; the service's log has the cause",
    "overloaded": "4096 rows are queued (VAE_QUEUE_ROWS); try again in 2 s",
    "not_ready": "version 2 is loading: trial: opening 3 of 6 graphs, 12 s so far",
    "no_room": "the override cannot be written: no space left on device; free some, then ask again",
    "too_many_connections": "4096 connections are open (VAE_MAX_CONNECTIONS); try again later",
    "deadline_passed": str(errors.DeadlinePassed()),
}
"""An example of `detail` for every code."""
SCHEMA = {
    "type": "object",
    "description": "A problem, as RFC 9457 defines it",
    "required": ["type", "title", "status", "code", "detail"],
    "properties": {
        "type": {"type": "string", "description": "Always about:blank"},
        "title": {"type": "string", "description": "The status in words"},
        "status": {"type": "integer", "description": "The HTTP status"},
        "code": {"type": "string", "description": "Stable: clients may branch on it"},
        "detail": {"type": "string", "description": "What is wrong, and the fix; for people"},
    },
}
"""OpenAPI schema of a problem, the component `Problem`."""


def problem(status: int, code: str, detail: str, path: str = "") -> tuple[bytes, str]:
    """(body, media type) of an error in the form that belongs to a path: a problem, as RFC 9457 has it, by default."""
    whole, below = PLAIN_PATHS
    if path == whole or path.startswith(below):
        return orjson.dumps({"error": detail}), PLAIN_TYPE
    title = TITLES.get(status, "Error")
    content = {"type": "about:blank", "title": title, "status": status, "code": code, "detail": detail}
    return orjson.dumps(content), MEDIA_TYPE


def describe(error: Exception, path: str = "") -> tuple[int, str, bytes, dict[str, str]]:
    """(status, code, body, headers) of the answer to any error in a request for a path.

    An error of status 500 is logged under the id of the request. One that is no ServiceError is a bug: its message
    stays in the log.
    """
    headers = {}
    if isinstance(error, MemoryError):
        log.error("request %s: no memory", request_id(), exc_info=error)
        error = errors.Overloaded("there is not enough memory for this request now; send fewer rows, or later", 1.0)
    if isinstance(error, errors.ServiceError):
        status, code, detail = STATUS.get(type(error), INTERNAL), error.code, str(error)
        if status == INTERNAL:
            log.error("request %s: %s", request_id(), error)
        if isinstance(error, errors.Unauthenticated):
            headers["www-authenticate"] = "Bearer"
        if isinstance(error, errors.Overloaded | errors.RateLimited):
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        elif status == STATUS[errors.NotReady]:
            headers["retry-after"] = "1"
    else:
        identity = request_id()
        log.error("internal error %s", identity, exc_info=error)
        status, code = INTERNAL, "internal_error"
        detail = f"an error of the service itself; its log has the cause under {identity}"
    content, headers["content-type"] = problem(status, code, detail, path)
    return status, code, content, headers


def examples() -> dict[str, Any]:
    """OpenAPI's examples of problems, the components that `documented` refers to."""
    return {
        kind.code: {"value": orjson.loads(problem(status, kind.code, DETAILS[kind.code])[0])}
        for kind, status in STATUS.items()
        if kind.code in DETAILS
    }


def respond(error: Exception, path: str = "") -> Response:
    """Give the response for any error in a request for a path."""
    status, _, content, headers = describe(error, path)
    return Response(content, status, headers)


def documented(*kinds: type[errors.ServiceError]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's responses for some errors; without arguments, for all that an operation may answer with."""
    codes: dict[int, list[str]] = {}
    for kind in kinds or [
        kind for kind in STATUS if kind not in (errors.CallerGone, errors.NotFound, errors.ReaderFault, *CONTROL)
    ]:
        codes.setdefault(STATUS[kind], []).append(kind.code)
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "description": f"{TITLES[status]}: {', '.join(names)}",
            "content": {
                MEDIA_TYPE: {
                    "schema": schema,
                    "examples": {name: {"$ref": f"#/components/examples/{name}"} for name in names},
                }
            },
        }
        for status, names in sorted(codes.items())
    }
