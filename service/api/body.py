"""A request's body: received, decompressed; and whether its sender is still there."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

from starlette.types import Receive

from service.api.memory import Share
from service.codecs import Body, Meter
from service.errors import Malformed, TooLarge, Unreadable, UnsupportedMediaType

WHOLE = "vae.whole_answer"
"""ASGI extension of `protocol.Protocol`: `http.response.start` may hold the whole body as `content`, which ends the
answer. Head and body are then one write, where two cost a small request a fifth of its time."""
LONGEST_LENGTH = 19
"""Digits in a Content-Length; more are above every limit."""
IDENTITY = b"identity"
WINDOW_BITS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
"""What zlib calls each content coding."""
RAW_DEFLATE = -15
PIECE = 2**20
"""Bytes that are decompressed at once."""
MOST_MEMBERS = 256
"""Streams, one after the other, in a body of gzip."""


class Limit(NamedTuple):
    """How large a body may be, compressed or not."""

    size: int
    setting: str
    advice: str

    def exceeded(self) -> TooLarge:
        """What a larger one is answered with."""
        return TooLarge(f"the body is above {self.setting} ({self.size}); {self.advice}")


async def read_body(receive: Receive, headers: dict[bytes, bytes], limit: Limit, share: Share) -> Body | None:
    """The whole body as it was sent; None where the caller has gone.

    Raises:
        TooLarge: It is above the limit; or, as Overloaded, there is no memory for it. Raised before the rest is read.
        UnsupportedMediaType: It has a transfer coding other than chunked.
        Malformed: Content-Length is no number.
    """
    if headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
        raise UnsupportedMediaType("Transfer-Encoding must be chunked; compress with Content-Encoding: gzip or deflate")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit():
        raise Malformed("Content-Length must be a whole number")
    if len(length) > LONGEST_LENGTH or int(length) > limit.size:
        raise limit.exceeded()
    message = await receive()
    body: Body = message.get("body", b"")
    share.grow(len(body))
    if message.get("more_body"):
        body = bytearray(body)  # grows in place, so that a large body is in memory once
    while message.get("more_body") and len(body) <= limit.size:
        message = await receive()
        further = message.get("body", b"")
        share.grow(len(further))
        body += further
    if len(body) > limit.size:
        raise limit.exceeded()
    return None if message["type"] == "http.disconnect" else body


def disconnected(receive: Receive) -> bool:
    """Whether the caller has hung up: one step of ASGI's receive, which says so at once or would wait."""
    step: Any = receive()
    try:
        step.send(None)
    except StopIteration as done:
        return bool(done.value["type"] == "http.disconnect")
    step.close()
    return False


def coding_of(headers: dict[bytes, bytes]) -> bytes:
    """The body's content coding.

    Raises:
        UnsupportedMediaType: It has another coding than gzip or deflate, or several.
    """
    coding = headers.get(b"content-encoding", IDENTITY).strip().lower() or IDENTITY
    if coding != IDENTITY and coding not in WINDOW_BITS:
        raise UnsupportedMediaType("Content-Encoding must be gzip, deflate or identity, one of them alone")
    return coding


def inflated(body: Body, coding: bytes, limit: Limit, meter: Meter) -> bytearray:
    """The body without its content coding, `deflate` with or without zlib's header (RFC 9110, section 8.4.1.2).

    Raises:
        TooLarge: It is above the limit when decompressed, or needs too much memory.
        Unreadable: It is not of that coding, or is cut short.
    """
    source, start, found = memoryview(body), 0, bytearray()
    for _ in range(MOST_MEMBERS):
        stream, rest = zlib.decompressobj(_window_bits(source[start:], coding)), b""
        while not stream.eof:
            meter.check_time()
            given = rest or source[start : start + PIECE]
            start += 0 if rest else len(given)
            try:
                piece = stream.decompress(given, PIECE)
            except zlib.error as error:
                raise Unreadable(f"the body is not {coding.decode()}, which Content-Encoding names") from error
            if not (given or piece or stream.eof):
                raise Unreadable(f"the {coding.decode()} body is cut short")
            meter.reserve(len(piece))
            found += piece
            if len(found) > limit.size:
                raise limit.exceeded()
            rest = stream.unconsumed_tail
        start -= len(stream.unused_data)
        if start == len(source) or coding == b"deflate":
            break
    if start < len(source):
        raise Unreadable(f"more follows the end of the {coding.decode()} body")
    return found


def _window_bits(body: memoryview, coding: bytes) -> int:
    """Raw deflate is told from zlib's format by the check bits of its header (RFC 1950, section 2.2)."""
    raw = coding == b"deflate" and (len(body) < 2 or body[0] & 15 != zlib.DEFLATED or (body[0] << 8 | body[1]) % 31)
    return RAW_DEFLATE if raw else WINDOW_BITS[coding]
