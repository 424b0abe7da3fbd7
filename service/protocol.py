"""uvicorn's HTTP protocol, with limits: on what a connection sends, and on how long it takes to send and to read."""

from __future__ import annotations

import sys
from asyncio import TimerHandle, Transport
from enum import Enum, auto
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service import problems
from service.config import Settings
from service.errors import (
    HeadersTooLarge,
    Malformed,
    ServiceError,
    SlowRequest,
    TooManyConnections,
    UrlTooLong,
)
from service.proxies import PEER

LINGER_S = 1.0
"""How long a refused connection stays, so that its caller can read why."""
BODIES = (b"content-length", b"transfer-encoding")
"""Headers of a request that has a body."""
LEAST_READ = 65536
"""Bytes of an answer that a caller must have read, of those that wait, each time it is looked at."""


class Part(Enum):
    """What may be still to come on a connection."""

    NEXT = auto()
    """Another request, of which nothing is there."""
    HEAD = auto()
    """The rest of a request's line and headers."""
    BODY = auto()
    """The rest of its body."""


class Protocol(HttpToolsProtocol):
    """One connection. A request that comes whole, as nearly all do, costs a few comparisons and sets no timer."""

    def __init__(self, *, settings: Settings, **parts: Any) -> None:
        """parts: what uvicorn hands to a protocol."""
        super().__init__(**parts)
        self.settings = settings
        self.timeout_keep_alive = settings.keep_alive_s  # type: ignore[assignment]  # a loop takes parts of seconds
        self._begun: Any = None  # the scope of the last request whose head is there
        self._chunk = 0  # bytes that are being parsed
        self._small = min(settings.max_url_bytes, settings.max_header_bytes)  # chunks that need no closer look
        self._max_headers = settings.max_headers
        self._awaited: Part | None = None
        self._fruitless = 0  # bytes that came and completed nothing
        self._sender: TimerHandle | None = None
        self._reader: TimerHandle | None = None
        self._unread = 0
        self._refused = False

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Turn it away where there are too many."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, PEER: self.client}
        limit, server = self.settings.max_connections, self.server
        if len(self.connections) > limit and not (server and server[1] == self.settings.ops_port):
            self.connections.discard(self)
            self._refuse(TooManyConnections(f"{limit} connections are open, VAE_MAX_CONNECTIONS; close some"))
        else:
            self._await(Part.NEXT)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        super().connection_lost(exc)
        self._await(None)
        self._untime_reader()

    def data_received(self, data: bytes) -> None:
        """Parse what came, and see what is still to come."""
        if self._refused:
            return
        self._chunk = len(data)
        super().data_received(data)
        cycle = self.cycle
        if self._awaited is None and self.scope is self._begun and not (cycle.more_body or cycle.response_complete):
            return  # a whole request is being answered
        missing = None if self._refused else self._missing()
        if missing is not self._awaited:
            self._await(missing)
        elif missing is not None:
            self._count()

    def on_headers_complete(self) -> None:
        """Refuse a head that is above a limit, before anything is done about it."""
        if self._chunk > self._small or len(self.headers) > self._max_headers or self._awaited is Part.HEAD:
            self._check_head()
        super().on_headers_complete()
        self._begun = self.scope
        self.headers = []  # trailers come here, where nobody takes them for headers
        if self._awaited is not None:
            self._await(None)
        if not self.cycle.keep_alive:
            self.cycle.on_response = self._on_last_response

    def _check_head(self) -> None:
        """Raises: UrlTooLong, HeadersTooLarge."""
        settings = self.settings
        if len(self.url) > settings.max_url_bytes:
            raise UrlTooLong(f"the URL has {len(self.url)} bytes, VAE_MAX_URL_BYTES is {settings.max_url_bytes}")
        if len(self.headers) > settings.max_headers:
            raise HeadersTooLarge(f"{len(self.headers)} headers, VAE_MAX_HEADERS is {settings.max_headers}")
        if sum(len(name) + len(value) for name, value in self.headers) > settings.max_header_bytes:
            raise self._too_large()

    def _missing(self) -> Part | None:
        """What is still to come; nothing until a whole request is answered."""
        if self.scope is not self._begun:
            return Part.HEAD
        if self.cycle is None or self.cycle.response_complete:
            return Part.NEXT if self.cycle is None or not self.cycle.more_body else Part.BODY
        return Part.BODY if self.cycle.more_body else None

    def _count(self) -> None:
        """Bound what comes and is kept by the parser, or by nobody: half a head, trailers, bodies not wanted."""
        cycle, settings = self.cycle, self.settings
        self._fruitless += self._chunk
        if self._awaited is Part.BODY and cycle.response_complete:
            if self._fruitless > settings.max_body_bytes:
                self.transport.abort()
        elif self._awaited is Part.BODY and cycle.body:
            self._fruitless = 0
        elif self._fruitless > settings.max_header_bytes:
            self._refuse(self._too_large())

    def _on_last_response(self) -> None:
        """The answer is written and the connection closes, when its caller has read."""
        self.on_response_complete()
        self._time_reader()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, which may still owe its caller the end of an answer."""
        super().timeout_keep_alive_handler()
        self._time_reader()

    def pause_writing(self) -> None:
        """The caller does not read as fast as is written."""
        super().pause_writing()
        self._time_reader()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._untime_reader()

    def _unsupported_upgrade_warning(self) -> None:
        """Pass over what nobody serves, unless a body comes too: the parser would take it for the next request."""
        if any(name in BODIES and value != b"0" for name, value in self.scope["headers"]):
            self.cycle.more_body = True
            self._refuse(
                Malformed("a request with a body cannot ask for an upgrade; send it without the header Upgrade")
            )

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser stops, which a limit above may be the cause of."""
        error = sys.exception()
        cause = error and error.__context__
        self._refuse(cause if isinstance(cause, ServiceError) else Malformed(msg))

    def _refuse(self, error: ServiceError) -> None:
        """Say so and close; an answer to an earlier request goes first, one that has begun is broken off."""
        self._refused = True
        cycle = self.cycle
        if self.scope is self._begun and cycle is not None and cycle.more_body:
            if cycle.response_started or self.pipeline:
                self.transport.abort()
                return
            cycle.disconnected = True
            cycle.message_event.set()
        elif self._answering():
            cycle.keep_alive = False
            return
        self.transport.write(self._answer(error))
        self._close()

    def _answer(self, error: ServiceError) -> bytes:
        status, _, content, headers = problems.describe(error)
        lines = [
            *((name.encode(), value.encode()) for name, value in headers.items()),
            (b"content-type", problems.MEDIA_TYPE.encode()),
            (b"content-length", b"%d" % len(content)),
            (b"connection", b"close"),
        ]
        head = b"".join(b"%b: %b\r\n" % line for line in [*self.server_state.default_headers, *lines])
        return b"%b%b\r\n%b" % (STATUS_LINE[status], head, content)

    def _close(self) -> None:
        """Close, but not before the caller has had time to read: what it still sends would undo what it was sent."""
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.loop.call_later(LINGER_S, self.transport.abort)
        else:
            self.transport.close()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await(self, part: Part | None) -> None:
        """Give it its time."""
        self._awaited, self._fruitless = part, 0
        if self._sender is not None:
            self._sender.cancel()
            self._sender = None
        if part is not None:
            settings = self.settings
            seconds = settings.body_timeout_s if part is Part.BODY else settings.head_timeout_s
            self._sender = self.loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        """What is awaited has not come in time."""
        part, waits = self._awaited, self.flow.read_paused or self.pipeline
        assert part is not None
        if waits or (part is Part.HEAD and self._answering()):
            self._await(part)  # it is the service that keeps the caller waiting
        elif part is Part.NEXT:
            self.transport.close()
        else:
            name = part.name
            self._refuse(SlowRequest(f"the request's {name.lower()} took longer than VAE_{name}_TIMEOUT_S allows"))

    def _time_reader(self) -> None:
        self._untime_reader()
        self._unread = self.transport.get_write_buffer_size()
        self._reader = self.loop.call_later(self.settings.answer_timeout_s, self._see_reader)

    def _untime_reader(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None

    def _see_reader(self) -> None:
        """Cut off a caller that has read next to nothing since the last look."""
        if self.transport.get_write_buffer_size() > self._unread - LEAST_READ:
            self.transport.abort()
        else:
            self._time_reader()

    def _too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(f"the headers are above VAE_MAX_HEADER_BYTES ({self.settings.max_header_bytes})")
