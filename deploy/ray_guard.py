"""Middleware of Ray Serve's HTTP proxies: what the service's own server does for a request, and Serve's does not.

A proxy reads a body to its end, whatever its size, and lets a request wait for a replica without end. Every proxy runs
this where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is `deploy.ray_guard:middleware`, as in `deploy/ray.env`. Nothing
here needs Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import problems
from service.errors import (
    DeadlinePassed,
    HeadersTooLarge,
    NotReady,
    Overloaded,
    ServiceError,
    SlowRequest,
    TooLarge,
    UrlTooLong,
)
from service.observability.request_ids import HEADER, RequestIds
from service.settings import Settings, read_settings

STEERING = {
    b"x_request_timeout_seconds", b"x_request_disconnect_disabled", b"serve_multiplexed_model_id", b"x_session_id",
}  # fmt: skip
"""Headers, with `_` for `-`, by which a client could change how Serve treats its request: they are removed."""
RETRY_AFTER_S = 1.0
DISCONNECT: Message = {"type": "http.disconnect"}


def middleware() -> list[Middleware]:
    """Give the middleware of a proxy; Serve calls it once in each.

    Raises:
        StartError: A VAE_ variable of this node is unknown or invalid.
    """
    return [Middleware(Guard, settings=read_settings())]


class Guard:
    """ASGI middleware around the application of a Serve proxy.

    Args:
        app: The proxy's application.
        settings: The settings of the service.
        grace_s: How much later than the service's own deadline an answer may begin. After it no replica has answered.
    """

    def __init__(self, app: ASGIApp, settings: Settings, grace_s: float = 2.0) -> None:
        self._app = app
        self._settings = settings
        self._grace_s = grace_s
        self._held = 0  # bytes of the bodies under way
        self._with_id = RequestIds(self._handle)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. WebSockets are refused: the service has none.

        It is a coroutine function: uvicorn, which Serve uses, calls any other application as one of ASGI 2.
        """
        if scope["type"] == "http":
            await self._with_id(scope, receive, send)
        else:
            await send({"type": "websocket.close"})

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_head(scope)
        except ServiceError as error:
            await problems.respond(error, scope["path"])(scope, receive, send)
            return
        # Serve keeps an id that is there, and hands it to the replica.
        scope["headers"] = [*_passed_on(scope["headers"]), (HEADER, scope["request_id"])]
        exchange = Exchange(self._settings, receive, send, self._hold, self._grace_s)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            self._held -= exchange.taken
        if not exchange.started and not exchange.gone:
            why = exchange.refusal or NotReady("the replica ended while it computed the answer; send the request again")
            await problems.respond(why, scope["path"])(scope, receive, send)

    def _check_head(self, scope: Scope) -> None:
        """Raise UrlTooLong or HeadersTooLarge."""
        settings, headers = self._settings, scope["headers"]
        url_bytes = len(scope["raw_path"]) + len(scope["query_string"]) + 1
        if url_bytes > settings.max_url_bytes:
            raise UrlTooLong(f"the URL has {url_bytes} bytes, VAE_MAX_URL_BYTES is {settings.max_url_bytes}")
        if len(headers) > settings.max_headers:
            raise HeadersTooLarge(f"{len(headers)} headers, VAE_MAX_HEADERS is {settings.max_headers}")
        header_bytes = sum(len(name) + len(value) for name, value in headers)
        if header_bytes > settings.max_header_bytes:
            raise HeadersTooLarge(
                f"the headers have {header_bytes} bytes, VAE_MAX_HEADER_BYTES is {settings.max_header_bytes}"
            )

    def _hold(self, size: int) -> bool:
        """Count bytes of a body; returns whether the bodies under way fit into the proxy's memory."""
        self._held += size
        return self._held <= self._settings.memory_bytes


class Exchange:
    """One request and its answer, as the proxy's application receives and sends them.

    A request that must end is shown to the application as one whose client has left, since Serve then cancels it at the
    replica. `refusal` has the reason for the client.

    Args:
        settings: The settings of the service.
        receive: Gives the messages of the client.
        send: Sends messages to it.
        hold: Counts bytes of the body; returns whether there is room for them.
        grace_s: As in Guard.
    """

    def __init__(
        self, settings: Settings, receive: Receive, send: Send, hold: Callable[[int], bool], grace_s: float
    ) -> None:
        self._settings, self._receive, self._send, self._hold = settings, receive, send, hold
        self._grace_s = grace_s
        self._deadline: float | None = asyncio.get_running_loop().time() + settings.body_timeout_s
        self._complete = False  # the body has come
        self.taken = 0
        """Bytes of the body so far."""
        self.refusal: ServiceError | None = None
        """Why the request ended early; None if it did not."""
        self.started = False
        """Whether the answer has begun."""
        self.gone = False
        """Whether the client has left."""

    async def receive(self) -> Message:
        """Return the client's next message, or that it has left where a limit is reached."""
        while self.refusal is None:
            try:
                async with asyncio.timeout_at(self._deadline):
                    message = await self._receive()
            except TimeoutError:
                self._deadline = None
                if not self.started:
                    self.refusal = self._late()
                continue
            if message["type"] == "http.disconnect":
                self.gone = True
                return message
            self._count(message)
            if self.refusal is None:
                return message
        return DISCONNECT

    async def send(self, message: Message) -> None:
        """Pass a message of the answer on, with one request id: the one that RequestIds adds around this."""
        if message["type"] == "http.response.start":
            if self.refusal is not None:
                return
            self.started = True
            message = {**message, "headers": [pair for pair in message["headers"] if pair[0].lower() != HEADER]}
        if self.started:
            await self._send(message)

    def _late(self) -> ServiceError:
        if not self._complete:
            return SlowRequest(
                f"the body did not arrive within {self._settings.body_timeout_s:g} s (VAE_BODY_TIMEOUT_S)"
            )
        return DeadlinePassed()

    def _count(self, message: Message) -> None:
        """Charge a part of the body, and set the deadline of the answer at its end."""
        size, settings = len(message.get("body", b"")), self._settings
        self.taken += size
        has_room = self._hold(size)
        if self.taken > settings.max_body_bytes:
            self.refusal = TooLarge(f"the body is above {settings.max_body_bytes} bytes (VAE_MAX_BODY_BYTES)")
        elif not has_room:
            self.refusal = Overloaded(
                f"the bodies under way exceed {settings.memory_bytes} bytes (VAE_MEMORY_BYTES); try again",
                RETRY_AFTER_S,
            )
        elif not message.get("more_body", False):
            self._complete = True
            self._deadline = asyncio.get_running_loop().time() + settings.timeout_s + self._grace_s


def _passed_on(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers without those that steer Serve, and without request ids."""
    return [pair for pair in headers if pair[0] != HEADER and pair[0].lower().replace(b"-", b"_") not in STEERING]
