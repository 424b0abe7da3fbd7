"""Who asked: an id for every request, accepted or given, echoed in its answer and told in the log; the access log."""

from __future__ import annotations

import logging
import re
import secrets
import time
from contextvars import ContextVar
from itertools import count
from typing import Any
from urllib.parse import quote

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

access = logging.getLogger("service.access")

HEADER = b"x-request-id"
TRACE_HEADERS = (b"traceparent", b"tracestate")
CLIENT_GONE = 499
"""As nginx logs a request whose caller left before the answer began."""

_plain = re.compile(rb"[\w.:=/+-]{1,128}", re.ASCII).fullmatch


def _beginning() -> bytes:
    return f"{secrets.token_hex(6)}-%x".encode()


_process, _numbers = _beginning(), count(1)
_current: ContextVar[Scope | None] = ContextVar("request", default=None)
_propagator = TraceContextTextMapPropagator()


class Tracking:
    """Gives every request its caller's X-Request-Id, or one of ours where that is none, and echoes it in the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's start and stop."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        identity = scope["request_id"] = _told(scope) or _new()
        _current.set(scope)
        echo = (HEADER, identity)

        def send_with_id(message: Message) -> Any:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], echo]
            return send(message)

        await self.app(scope, receive, send_with_id)


class AccessLog:
    """A line for every request when it is over: what was asked, what came of it, how long it took; no bodies."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's start and stop."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = CLIENT_GONE, time.perf_counter()

        def noting(message: Message) -> Any:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            _log_access(scope, status, (time.perf_counter() - started) * 1e3)


def renew() -> None:
    """Give the ids of this process another beginning than those of the process that it was forked from."""
    global _process  # noqa: PLW0603  # read at every request
    _process = _beginning()


def request_id() -> str:
    """Of the request that is being served; a new one outside of any."""
    scope = _current.get()
    return (_new() if scope is None else scope["request_id"]).decode()


def known() -> dict[str, str]:
    """What is known of the request that is being served, for the log: its id, and where in which trace it is."""
    scope = _current.get()
    if scope is None:
        return {}
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in TRACE_HEADERS}
        span = trace.get_current_span(_propagator.extract(headers)).get_span_context()
    told = {"request_id": scope["request_id"].decode()}
    if span.is_valid:
        told |= {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}
    return told


def _told(scope: Scope) -> bytes | None:
    """The caller's id, if it is short and plain: it goes into headers and logs as it is."""
    for name, value in scope["headers"]:
        if name == HEADER:
            return value if _plain(value) else None
    return None


def _new() -> bytes:
    """No other request's of any process; cheaper than 16 random bytes."""
    return _process % next(_numbers)


def _log_access(scope: Scope, status: int, duration_ms: float) -> None:
    client = "{}:{}".format(*scope["client"]) if scope.get("client") else ""
    path = quote(scope["path"]) + ("?" + scope["query_string"].decode("latin-1") if scope["query_string"] else "")
    identity = scope["request_id"].decode()
    key = scope.get("key")
    access.info(
        '%s%s "%s %s" %d %.1f ms %s', client, f" {key}" if key else "", scope["method"], path, status, duration_ms,
        identity,
        extra={
            "client": client,
            "method": scope["method"],
            "path": path,
            "status": status,
            "duration_ms": round(duration_ms, 3),
            **({"key": key} if key else {}),
            **scope.get("served", {}),
        },
    )  # fmt: skip
