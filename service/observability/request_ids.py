"""Request ids: one for every request, from the caller or new, echoed in the answer and written to the log."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable
from contextvars import ContextVar
from itertools import count
from typing import Any

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
TRACE_HEADERS = (b"traceparent", b"tracestate")

_valid = re.compile(rb"[\w.:=/+-]{1,128}", re.ASCII).fullmatch


def _new_prefix() -> bytes:
    return f"{secrets.token_hex(6)}-%x".encode()


_prefix, _numbers = _new_prefix(), count(1)
_current: ContextVar[Scope | None] = ContextVar("request", default=None)
_propagator = TraceContextTextMapPropagator()


class RequestIds:
    """ASGI middleware that gives every request its caller's X-Request-Id, or a new one, and echoes it in the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Handle one request, or the lifespan of the application. Not a coroutine itself, which saves time."""
        if scope["type"] != "http":
            return self.app(scope, receive, send)
        identity = scope["request_id"] = _from_caller(scope) or _new()
        _current.set(scope)
        echo = (HEADER, identity)

        def send_with_id(message: Message) -> Any:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], echo]
            return send(message)

        return self.app(scope, receive, send_with_id)


def renew() -> None:
    """Choose a new prefix of ids. Call it after a fork, so that two processes never give the same id."""
    global _prefix  # noqa: PLW0603  # read at every request
    _prefix = _new_prefix()


def request_id() -> str:
    """Return the id of the current request; a new one outside of any request."""
    scope = _current.get()
    return (_new() if scope is None else scope["request_id"]).decode()


def log_fields() -> dict[str, str]:
    """Return what a log record has of the current request: `request_id`, and `trace_id` and `span_id` if traced."""
    scope = _current.get()
    if scope is None:
        return {}
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in TRACE_HEADERS}
        span = trace.get_current_span(_propagator.extract(headers)).get_span_context()
    fields = {"request_id": scope["request_id"].decode()}
    if span.is_valid:
        fields |= {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}
    return fields


def _from_caller(scope: Scope) -> bytes | None:
    """Return the caller's id if it is short and has no special characters: it goes into headers and logs unchanged."""
    for name, value in scope["headers"]:
        if name == HEADER:
            return value if _valid(value) else None
    return None


def _new() -> bytes:
    """Return an id that no other request of any process has. A counter costs less than 16 random bytes."""
    return _prefix % next(_numbers)
