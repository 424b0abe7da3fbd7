"""HTTP methods and paths that no route names: HEAD, OPTIONS *, and the path under which a proxy serves the service."""

from __future__ import annotations

from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.security.proxies import Proxies
from service.settings import is_prefix

METHODS = "GET, HEAD, POST, OPTIONS"


class Methods:
    """Answers HEAD as GET is answered, without the body, and OPTIONS about the whole service."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's start and stop."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] == "HEAD":

            async def without_body(message: Message) -> None:
                await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

            await self._app({**scope, "method": "GET"}, receive, without_body)
        elif scope["method"] == "OPTIONS" and scope["path"] == "*":
            await Response(status_code=204, headers={"allow": METHODS})(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class RootPath:
    """Removes the path under which a proxy serves the service, where the proxy has not; keeps it as `prefix`.

    Everything behind it sees one path for one thing: nothing has to think of `root_path`, or forgets to.
    """

    def __init__(self, app: ASGIApp, root_path: str, proxies: Proxies) -> None:
        """root_path: that of requests whose proxy names none."""
        self._app = app
        self._root_path = root_path
        self._proxies = proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's start and stop."""
        if scope["type"] == "http":
            prefix = scope["prefix"] = self._told(scope) or self._root_path
            if prefix and f"{scope['path']}/".startswith(f"{prefix}/"):
                scope["path"] = scope["path"].removeprefix(prefix) or "/"
                scope["raw_path"] = scope.get("raw_path", b"").removeprefix(prefix.encode()) or b"/"
        await self._app(scope, receive, send)

    def _told(self, scope: Scope) -> str:
        """What a trusted proxy says, or several, each for itself; empty where it is not a plain path."""
        lines = [value for name, value in scope["headers"] if name == b"x-forwarded-prefix"]
        if not lines or not self._proxies.sent(scope):
            return ""
        parts = b",".join(lines).decode("latin-1").split(",")
        prefix = "".join(part.strip().rstrip("/") for part in parts)
        return prefix if is_prefix(prefix) else ""
