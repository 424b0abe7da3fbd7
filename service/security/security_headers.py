"""Security headers for HTML pages."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'",
    "script-src 'self' {scripts}",
    "style-src 'self' 'unsafe-inline'",  # Swagger UI sets styles of elements
    "img-src 'self' data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)
EVERYWHERE = [(b"x-content-type-options", b"nosniff")]


class SecurityHeaders:
    """ASGI middleware that adds security headers to every answer, and further ones to HTML pages."""

    def __init__(self, app: ASGIApp, script_hashes: Iterable[str]) -> None:
        """script_hashes: sources of the policy for the scripts within the pages, as in `'sha256-...'`."""
        self._app = app
        policy = "; ".join(POLICY).format(scripts=" ".join(script_hashes))
        self._page = [
            (b"content-security-policy", policy.encode()),
            (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"no-referrer"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = dict(message["headers"])
                page = self._page if told.get(b"content-type", b"").startswith(b"text/html") else []
                further = [header for header in page if header[0] not in told]  # a page may have its own policy
                message["headers"] = [*message["headers"], *EVERYWHERE, *further]
            await send(message)

        await self._app(scope, receive, send_with_headers)
