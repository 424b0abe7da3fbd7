"""The access log: one line for every request."""

from __future__ import annotations

import logging
import time
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

access = logging.getLogger("service.access")

CLIENT_GONE = 499
"""Status logged for a request whose caller left before the answer began, as nginx does."""


class AccessLog:
    """ASGI middleware that logs method, path, status and duration of every request when it ends; never a body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the lifespan of the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = CLIENT_GONE, time.perf_counter()

        def send_noting_status(message: Message) -> Any:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        try:
            await self.app(scope, receive, send_noting_status)
        finally:
            _log(scope, status, (time.perf_counter() - started) * 1e3)


def _log(scope: Scope, status: int, duration_ms: float) -> None:
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
