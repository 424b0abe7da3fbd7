"""Errors to RFC 9457 problem+json: the only file that knows status codes."""

from __future__ import annotations

import logging
import math
import secrets
from typing import Any

import orjson

from service import errors

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
INTERNAL = 500
CLIENT_CLOSED_REQUEST = 499  # as nginx logs it; it reaches nobody
STATUS: dict[type[errors.ServiceError], int] = {
    errors.Unreadable: 400,
    errors.UnknownModel: 404,
    errors.NotAcceptable: 406,
    errors.TooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.InvalidShape: 422,
    errors.InvalidValue: 422,
    errors.InvalidOption: 422,
    errors.UnsupportedOperation: 422,
    errors.CallerGone: CLIENT_CLOSED_REQUEST,
    errors.InferenceFailed: INTERNAL,
    errors.Overloaded: 503,
    errors.NotReady: 503,
    errors.DeadlinePassed: 504,
}
TITLES = {
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    406: "Not Acceptable",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    500: "Internal Server Error",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


def problem(status: int, code: str, detail: str) -> bytes:
    """The body of a problem."""
    title = TITLES.get(status, "Error")
    return orjson.dumps({"type": "about:blank", "title": title, "status": status, "code": code, "detail": detail})


def describe(error: Exception) -> tuple[int, str, bytes, dict[str, str]]:
    """(status, code, body, headers) of any error; one that is not ours is a bug, logged under an id and not told."""
    if isinstance(error, MemoryError):
        log.error("no memory for a request", exc_info=error)
        error = errors.Overloaded("there is not enough memory for this request now; send fewer rows, or later", 1.0)
    if isinstance(error, errors.ServiceError):
        status = STATUS.get(type(error), INTERNAL)
        headers = {}
        if isinstance(error, errors.Overloaded):
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        elif status == STATUS[errors.NotReady]:
            headers["retry-after"] = "1"
        return status, error.code, problem(status, error.code, str(error)), headers
    identity = secrets.token_hex(6)
    log.error("internal error %s", identity, exc_info=error)
    detail = f"an error of the service itself; its log has the cause under {identity}"
    return INTERNAL, "internal_error", problem(INTERNAL, "internal_error", detail), {}


def documented() -> dict[int | str, dict[str, Any]]:
    """Every status an operation may answer with, for OpenAPI."""
    codes: dict[int, list[str]] = {}
    for kind, status in STATUS.items():
        if status == CLIENT_CLOSED_REQUEST:
            continue
        codes.setdefault(status, []).append(kind.code)
    schema = {
        "type": "object",
        "required": ["type", "title", "status", "code", "detail"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "code": {"type": "string"},
            "detail": {"type": "string"},
        },
    }
    return {
        status: {"description": f"{TITLES[status]}: {', '.join(names)}", "content": {MEDIA_TYPE: {"schema": schema}}}
        for status, names in sorted(codes.items())
    }
