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
        status: {"description": f"{TITLES[status]}: {', '.join(names)}", "content": {MEDIA_TYPE: {"schema": schema}}}
        for status, names in sorted(codes.items())
    }
