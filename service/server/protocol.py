"""uvicorn's HTTP protocol with limits on the size of requests, and on the time to send them and to read answers."""

from __future__ import annotations

import re
from asyncio import TimerHandle, Transport
from collections.abc import Callable, Iterable
from enum import Enum, auto
from ipaddress import IPv6Address
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.errors import (
    HeadersTooLarge,
    Malformed,
    ServiceError,
    SlowRequest,
    UrlTooLong,
)
from service.security.proxies import PEER
from service.server.connections import Connections
from service.settings import Settings

Respond = Callable[[ServiceError, str], Response]
"""Gives the response for an error."""
WHOLE_ANSWER = "vae.whole_answer"
"""ASGI extension: `http.response.start` may hold the whole body as `content`, which ends the answer, and bodies may be
memoryviews. Head and body are then one write; two writes cost a small request a fifth of its time."""
EXTENSIONS: dict[str, dict[object, object]] = {WHOLE_ANSWER: {}}
LINGER_S = 1.0
"""How long a refused connection stays open, so that its caller can read the reason."""
BODIES = (b"content-length", b"transfer-encoding")
"""Headers that only requests with a body have."""
LEAST_READ = 65536
"""Bytes of a buffered answer that a caller must read in every `answer_timeout_s`."""
SPARE_S = 1.0
"""How long a connection above the limits may take to send a health check."""
FRAMING = frozenset((b"host", b"transfer-encoding"))
"""Headers that decide which host a request is for and where it ends. The parser checks Content-Length itself."""
HEALTH = ("/health/", "/v2/health/")
"""Beginnings of paths that are answered when all connections are taken."""
SLASH, HASH = b"/"[0], b"#"
VERSIONS = ("1.0", "1.1")
LARGEST_PORT = 65535

_host = re.compile(
    rb"(?:(?:[\w.~!$&'()*+;=-]|%[0-9A-Fa-f]{2}){1,255}|\[([0-9A-Fa-f:.]{2,45})\])(?::(\d{0,5}))?"
).fullmatch


class Part(Enum):
    """The part of a request that a connection waits for."""

    NEXT = auto()
    """The next request, of which no byte has come."""
    HEAD = auto()
    """The rest of a request's line and headers."""
    BODY = auto()
    """The rest of its body."""


def head_of(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the status line and headers of an answer, without the empty line that ends them."""
    lines = [STATUS_LINE[status]]
    for name, value in headers:
        lines += (name, b": ", value, b"\r\n")
    return b"".join(lines)


class Cycle(RequestResponseCycle):
    """One request and its answer. An answer with its whole body, as the extension allows, is one write."""

    async def send(self, message: Any) -> None:
        """Send a message as uvicorn does; `content` in `http.response.start` is the whole body."""
        content = message.get("content")
        if content is None:
            await super().send(message)
            return
        headers = self.default_headers + message["headers"]
        plain = len(self.default_headers) == 1 and self.keep_alive  # else a header closes the connection
        if not plain or self.flow.write_paused or self.disconnected or self.response_started:
            await super().send(message)
            await super().send({"type": "http.response.body", "body": content})
            return
        head = head_of(message["status"], headers)
        if head.count(b"\n") != len(headers) + 1 or head.count(b"\r") != len(headers) + 1:
            raise RuntimeError("a header of the answer has a line break")
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.transport.write(b"%b\r\n%b" % (head, content))
        self.message_event.set()
        self.on_response()


class Protocol(HttpToolsProtocol):
    """One connection. A request that arrives in one piece, as nearly all do, costs a few comparisons and no timer.

    Args:
        settings: The settings of the service.
        respond: Gives the response for an error in a request for a path.
        connections: Limits on connections, of the whole worker.
        **parts: What uvicorn passes to a protocol.
    """

    def __init__(self, *, settings: Settings, respond: Respond, connections: Connections, **parts: Any) -> None:
        super().__init__(**parts)
        self.settings = settings
        self.timeout_keep_alive = settings.keep_alive_s  # type: ignore[assignment]  # a loop takes parts of seconds
        self._respond = respond
        self.url = b""  # until a request begins
        self._limits = connections
        self._excess: ServiceError | None = None  # the reason, for a connection above the limits
        self._counted = False
        self._framing: list[tuple[bytes, bytes]] | None = None  # that of the last request, which passed
        self._begun: Any = None  # the scope of the last request with a complete head
        self._chunk = 0  # bytes being parsed
        self._small = min(
            settings.max_url_bytes, settings.max_header_bytes
        )  # a head in a smaller chunk is within the limits
        self._max_headers = settings.max_headers
        self._awaited: Part | None = None
        self._fruitless = 0  # bytes received without completing the awaited part
        self._sender: TimerHandle | None = None
        self._reader: TimerHandle | None = None
        self._unread = 0
        self._refused = False
        self._linger: TimerHandle | None = None
        self._linger_end = 0.0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Count the connection. Above the limits it stays open for a moment, since it may be a health check."""
        super().connection_made(transport)
        settings, client = self.settings, self.client
        self.app_state = {**self.app_state, PEER: client}
        if self.server is None or self.server[1] != settings.ops_port:
            self._excess = self._limits.over(len(self.connections), client)
            self._counted = self._excess is None
        if self._excess is not None:
            self.connections.discard(self)
            if settings.ops_port is not None:  # which is where health is
                self._refuse(self._excess)
                return
            self._limits.keep(self, self._turn_away)
        self._await(Part.NEXT)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the connection's counts and timers."""
        super().connection_lost(exc)
        if self._counted:
            self._limits.closed(self.client)
        self._limits.release(self)
        self._await(None)
        self._untime_reader()
        if self._linger is not None:
            self._linger.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, then set the timer for the part that is still to come."""
        if self._linger is not None:
            self._drain(len(data))
        if self._refused:
            return
        self._chunk = len(data)
        self._unset_keepalive_if_required()
        try:
            try:
                self.parser.feed_data(data)
            except HttpParserUpgrade as upgrade:
                self._decline(data[upgrade.args[0] :])
        except HttpParserError as error:
            self._refuse(_reason(error))
        cycle = self.cycle
        if self._awaited is None and self.scope is self._begun and not (cycle.more_body or cycle.response_complete):
            return  # a complete request is being answered
        missing = None if self._refused else self._missing()
        if missing is not self._awaited:
            self._await(missing)
        elif missing is not None:
            self._count()

    def on_headers_complete(self) -> None:
        """Refuse a head that is above a limit or ambiguous, before the request is handled."""
        if self._chunk > self._small or len(self.headers) > self._max_headers or self._awaited is Part.HEAD:
            self._check_head()
        framing = [header for header in self.headers if header[0] in FRAMING]
        if framing != self._framing:  # nearly all requests of a connection repeat it
            self._check_framing(framing)
        if self.url[0] != SLASH or HASH in self.url:
            self._check_target()
        if self._excess is not None:
            self._check_excess()
        super().on_headers_complete()
        self.scope["extensions"] = EXTENSIONS
        self.cycle.__class__ = Cycle
        self._begun = self.scope
        self.headers = []  # the parser appends trailers here, which must not count as headers
        if self._awaited is not None:
            self._await(None)
        if self._excess is not None:
            self.cycle.keep_alive = False
        if self.expect_100_continue:
            self._await_continue()
        elif not self.cycle.keep_alive:
            self._end_with(self.cycle)

    def _check_head(self) -> None:
        """Raise UrlTooLong or HeadersTooLarge."""
        settings = self.settings
        if len(self.url) > settings.max_url_bytes:
            raise UrlTooLong(f"the URL has {len(self.url)} bytes, VAE_MAX_URL_BYTES is {settings.max_url_bytes}")
        if len(self.headers) > settings.max_headers:
            raise HeadersTooLarge(f"{len(self.headers)} headers, VAE_MAX_HEADERS is {settings.max_headers}")
        if sum(len(name) + len(value) for name, value in self.headers) > settings.max_header_bytes:
            raise self._too_large()

    def _check_framing(self, framing: list[tuple[bytes, bytes]]) -> None:
        """Raise Malformed if it is ambiguous which host a request is for, or where it ends."""
        version = self.parser.get_http_version()
        if version not in VERSIONS:
            raise Malformed(f"HTTP/{version} is not spoken here; send HTTP/1.1")
        hosts = [value for name, value in framing if name == b"host"]
        if len(hosts) > 1:
            raise Malformed("the header Host is there more than once; send it once")
        if not hosts and version == "1.1":
            raise Malformed("the header Host is missing; HTTP/1.1 requires it")
        if hosts and not is_host(hosts[0]):
            raise Malformed("the header Host is not a host name or an IP address, with or without a port")
        codings = len(framing) - len(hosts)
        if codings > 1 or (codings and version == "1.0"):
            raise Malformed("Transfer-Encoding must be there once, and with HTTP/1.1; send `chunked` alone")
        self._framing = framing

    def _check_target(self) -> None:
        """Reduce an absolute URL to its path.

        Raises:
            Malformed: The target is neither a path nor an absolute URL of this host.
        """
        if self.url == b"*" and self.parser.get_method() == b"OPTIONS":
            return
        parts = urlsplit(self.url)
        if HASH in self.url or parts.scheme not in (b"http", b"https") or not parts.netloc:
            raise Malformed("the request's target is not a path; send it as `GET /path HTTP/1.1`")
        port = b":80" if parts.scheme == b"http" else b":443"
        names = {value.lower().removesuffix(port) for name, value in self._framing or () if name == b"host"}
        if not is_host(parts.netloc) or names - {parts.netloc.lower().removesuffix(port)}:
            raise Malformed("the request's target names another host than its header Host")
        self.url = (parts.path or b"/") + (b"?" + parts.query if parts.query else b"")

    def _check_excess(self) -> None:
        """Raise TooManyConnections, except for a health check."""
        assert self._excess is not None
        if self.parser.get_method() not in (b"GET", b"HEAD") or not self._path().startswith(HEALTH):
            raise self._excess
        self._limits.release(self)

    def _await_continue(self) -> None:
        """Close after an answer that was sent before `100 Continue`: the caller may then omit the body."""
        cycle = self.cycle
        receive, keep_alive = cycle.receive, cycle.keep_alive
        cycle.keep_alive = False
        self._end_with(cycle)

        async def continued() -> Any:
            if keep_alive and not cycle.response_started:
                cycle.keep_alive, cycle.on_response = True, self.on_response_complete
            return await receive()

        cycle.receive = continued  # type: ignore[method-assign]

    def _end_with(self, cycle: Any, *, more: bool = False) -> None:
        """Close the connection after this answer.

        Args:
            cycle: The request that is answered.
            more: The caller may still be sending after its body; it gets time to read the answer first.
        """

        def close() -> None:
            if more or cycle.more_body:
                self._refused = True
                self._close()
            else:
                self.transport.close()

        transport = self.transport
        cycle.transport = SimpleNamespace(write=transport.write, is_closing=transport.is_closing, close=close)
        cycle.on_response = self._on_last_response

    def _decline(self, rest: bytes) -> None:
        """Answer a request for an upgrade as if it asked for none: only HTTP/1.1 is supported.

        The parser has stopped after the head. A second parser reads the body. Nothing after the body is parsed, since
        it may be in another protocol.
        """
        cycle = self.cycle
        cycle.more_body = True
        if self.scope["method"] == "CONNECT":
            self._refuse(Malformed("CONNECT is for proxies, and this is none"))
            return
        cycle.keep_alive = False
        vars(cycle).pop("receive", None)  # the one of `_await_continue` may keep the connection open
        self._end_with(cycle, more=True)
        lines = [b"%b: %b\r\n" % (name, value) for name, value in self.scope["headers"] if name in BODIES]
        if not lines:
            cycle.more_body = False
            self._refused = True
            return
        cycle.message_event.clear()
        self.parser = HttpRequestParser(SimpleNamespace(on_body=self.on_body, on_message_complete=self._on_last_body))
        self.parser.feed_data(b"".join([b"POST / HTTP/1.1\r\nconnection: close\r\n", *lines, b"\r\n"]))
        self.parser.feed_data(rest)  # `close` makes it stop at the end of the body

    def _on_last_body(self) -> None:
        self.on_message_complete()
        self._refused = True

    def _missing(self) -> Part | None:
        """Return the part that is still to come; None while a complete request is answered."""
        if self.scope is not self._begun:
            return Part.HEAD
        if self.cycle is None or self.cycle.response_complete:
            return Part.NEXT if self.cycle is None or not self.cycle.more_body else Part.BODY
        return Part.BODY if self.cycle.more_body else None

    def _count(self) -> None:
        """Limit bytes that complete no request: half a head, trailers, and bodies of answered requests."""
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
        """Time the caller's reading of the last answer, after which the connection closes."""
        if self._linger is None:
            self.on_response_complete()
            self._time_reader()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; the end of its last answer may still be unread."""
        super().timeout_keep_alive_handler()
        self._time_reader()

    def pause_writing(self) -> None:
        """Time a caller that reads more slowly than the answer is written."""
        super().pause_writing()
        self._time_reader()

    def resume_writing(self) -> None:
        """Stop timing a caller that has caught up."""
        super().resume_writing()
        self._untime_reader()

    def _refuse(self, error: ServiceError) -> None:
        """Answer with an error and close. An earlier request is answered first; an answer that has begun is cut off."""
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
        response = self._respond(error, self._path())
        headers = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        return b"%b\r\n%b" % (head_of(response.status_code, headers), bytes(response.body))

    def _path(self) -> str:
        """The path of the request, without the proxy's prefix; empty before it has arrived."""
        path: bytes = self.url.partition(b"?")[0]
        return path.decode("latin-1").removeprefix(self.settings.root_path)

    def _turn_away(self) -> None:
        """Close a connection above the limits that sent no health check."""
        assert self._excess is not None
        if not self._refused:
            self._refuse(self._excess)

    def _close(self) -> None:
        """Close for writing and drop what still arrives: a reset would discard the answer before it is read."""
        self._await(None)
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._linger_end = self.loop.time() + self.settings.body_timeout_s
            self._linger = self.loop.call_later(LINGER_S, self.transport.abort)
        else:
            self.transport.close()

    def _drain(self, size: int) -> None:
        """Drop received bytes, up to the limits of a body."""
        assert self._linger is not None
        self._linger.cancel()
        self._fruitless += size
        if self._fruitless > self.settings.max_body_bytes or self.loop.time() > self._linger_end:
            self.transport.abort()
        else:
            self._linger = self.loop.call_later(LINGER_S, self.transport.abort)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await(self, part: Part | None) -> None:
        """Wait for a part of a request and start its timer; None waits for nothing."""
        self._awaited, self._fruitless = part, 0
        if self._sender is not None:
            self._sender.cancel()
            self._sender = None
        if part is not None:
            settings = self.settings
            seconds = settings.body_timeout_s if part is Part.BODY else settings.head_timeout_s
            if self._excess is not None:
                seconds = min(seconds, SPARE_S)
            self._sender = self.loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        """Handle a part that has not come in time."""
        part, waits = self._awaited, self.flow.read_paused or self.pipeline
        assert part is not None
        if waits or (part is Part.HEAD and self._answering()):
            self._await(part)  # the service keeps the caller waiting, not the other way round
        elif self._excess is not None and self.cycle is None:
            self._turn_away()
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
        """Cut off a caller that has read fewer than LEAST_READ bytes since the last check."""
        if self.transport.get_write_buffer_size() > self._unread - LEAST_READ:
            self.transport.abort()
        else:
            self._time_reader()

    def _too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(f"the headers are above VAE_MAX_HEADER_BYTES ({self.settings.max_header_bytes})")


def _reason(error: HttpParserError) -> ServiceError:
    """Return the error for a request at which the parser stopped."""
    if not isinstance(error, HttpParserCallbackError):
        return Malformed(f"the request is not HTTP/1.1: {error}")
    cause = error.__context__
    return cause if isinstance(cause, ServiceError) else Malformed("the request's target is not a path; see /docs")


def is_host(value: bytes) -> bool:
    """Return whether a value is a host as in RFC 3986, with or without a port."""
    found = _host(value)
    if not found:
        return False
    address, port = found.groups()
    try:
        return (not address or bool(IPv6Address(address.decode()))) and int(port or 0) <= LARGEST_PORT
    except ValueError:
        return False
