"""ASGI middleware for HEAD, `OPTIONS *` and the path prefix of a proxy."""

from __future__ import annotations

from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.security.proxies import Proxies
from service.settings import is_prefix

METHODS = "GET, HEAD, POST, OPTIONS"


class Methods:
    """ASGI middleware that answers HEAD like GET without the body, and `OPTIONS *`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the lifespan of the application."""
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
    """ASGI middleware that removes a proxy's path prefix from `path` and keeps it in the scope as `prefix`.

    Routes and middleware behind it need no care for `root_path`: each resource has one path.

    Args:
        app: Handles the requests.
        root_path: Prefix of requests whose proxy names none.
        proxies: Trusted proxies, whose X-Forwarded-Prefix is believed.
    """

    def __init__(self, app: ASGIApp, root_path: str, proxies: Proxies) -> None:
        self._app = app
        self._root_path = root_path
        self._proxies = proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the lifespan of the application."""
        if scope["type"] == "http":
            prefix = scope["prefix"] = self._forwarded(scope) or self._root_path
            if prefix and scope["path"] == prefix:  # links of the page at / are relative, and need the slash
                await Response(status_code=307, headers={"location": f"{prefix[prefix.rfind('/') + 1 :]}/"})(
                    scope, receive, send
                )
                return
            if prefix and f"{scope['path']}/".startswith(f"{prefix}/"):
                scope["path"] = scope["path"].removeprefix(prefix) or "/"
                scope["raw_path"] = scope.get("raw_path", b"").removeprefix(prefix.encode()) or b"/"
        await self._app(scope, receive, send)

    def _forwarded(self, scope: Scope) -> str:
        """Return the prefix from trusted proxies, several joined; empty if it is not a plain path."""
        lines = [value for name, value in scope["headers"] if name == b"x-forwarded-prefix"]
        if not lines or not self._proxies.sent(scope):
            return ""
        parts = b",".join(lines).decode("latin-1").split(",")
        prefix = "".join(part.strip().rstrip("/") for part in parts)
        return prefix if is_prefix(prefix) else ""
