"""Security headers for HTML pages."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.admin.docs import SCRIPT_HASHES

POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src 'self' {' '.join(SCRIPT_HASHES)}",
        "style-src 'self' 'unsafe-inline'",  # Swagger UI sets styles of elements
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
EVERYWHERE = [(b"x-content-type-options", b"nosniff")]
PAGE = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]


class PageHeaders:
    """Adds them. Operations, whose answers are no pages, do not pass here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                page = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/html")
                message["headers"] = [*message["headers"], *EVERYWHERE, *(PAGE if page else [])]
            await send(message)

        await self._app(scope, receive, told)
