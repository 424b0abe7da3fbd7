"""What every HTTP face reads of a request: header fields, deadline, body; and whether the caller is still there."""

from __future__ import annotations

import time
import zlib
from typing import Any, NamedTuple

from starlette.types import Receive
from werkzeug.http import parse_accept_header

from service.api.memory import Share
from service.codecs.payload import Body, Meter
from service.errors import InvalidOption, Malformed, TooLarge, Unreadable, UnsupportedMediaType
from service.settings import Settings

SINGLE = {
    b"content-type", b"content-encoding", b"x-timeout-ms", b"x-fingerprint", b"inference-header-content-length",
}  # fmt: skip
"""Header fields that must not be repeated: two readers might use different ones."""
LONGEST_TIMEOUT = 12
"""Most digits of X-Timeout-Ms."""
LONGEST_LENGTH = 19
"""Most digits of Content-Length; a longer one is above every limit."""
IDENTITY = b"identity"
WINDOW_BITS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
"""zlib's parameter for each content coding."""
RAW_DEFLATE = -15
PIECE = 2**20
"""Bytes that are decompressed between two checks."""
LONGEST_LIST = 512
"""Characters of an Accept-Encoding header that are read."""
MOST_MEMBERS = 256
"""Most gzip streams, one after the other, in one body."""


class Limit(NamedTuple):
    """Most bytes of a body, compressed or not, with the setting that raises it and further advice."""

    size: int
    setting: str
    advice: str

    def exceeded(self) -> TooLarge:
        """The error for a larger body."""
        return TooLarge(f"the body is above {self.setting} ({self.size}); {self.advice}")


def body_limits(settings: Settings) -> tuple[Limit, Limit]:
    """The limit of bodies in general, and that of JSON, whose parsing delays every other request."""
    advice = (
        "send arrays as application/x-npy or application/octet-stream and pictures as files, on /v2 tensors as binary "
        "data, or raise it"
    )
    most, most_json = settings.max_body_bytes, settings.max_json_bytes
    limit = Limit(most, "VAE_MAX_BODY_BYTES", "send fewer rows, or raise it")
    return limit, min(limit, Limit(most_json, "VAE_MAX_JSON_BYTES", advice), key=lambda one: one.size)


def fields(headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Header fields by name. Accept, which is a list, may be sent in several lines.

    Raises:
        Malformed: A field of `SINGLE` is repeated.
    """
    found = dict(headers)
    if len(found) == len(headers):
        return found
    for name in found.keys() & SINGLE:
        if sum(sent == name for sent, _ in headers) > 1:
            raise Malformed(f"the header {name.decode().title()} is there twice; send it once")
    if b"accept" in found:
        found[b"accept"] = b", ".join(value for name, value in headers if name == b"accept")
    return found


def timeout_of(headers: dict[bytes, bytes], most_s: float) -> float:
    """Seconds that a request may take: X-Timeout-Ms, at most `most_s`.

    Raises:
        InvalidOption: X-Timeout-Ms is not a positive whole number.
    """
    wished = headers.get(b"x-timeout-ms")
    if wished is not None:
        if not wished.isdigit() or len(wished) > LONGEST_TIMEOUT or int(wished) == 0:
            raise InvalidOption("X-Timeout-Ms must be a whole number of milliseconds, from 1 to 12 digits long")
        return min(most_s, int(wished) / 1000.0)
    return most_s


def deadline_of(headers: dict[bytes, bytes], most_s: float) -> float:
    """The request's deadline by time.monotonic(), with `timeout_of` from now."""
    return time.monotonic() + timeout_of(headers, most_s)


async def read_body(receive: Receive, headers: dict[bytes, bytes], limit: Limit, share: Share) -> Body | None:
    """Receive a body; its bytes are taken from the memory budget as they arrive.

    Returns:
        The whole body as it was sent; None where the caller has hung up.

    Raises:
        TooLarge: It is above the limit or needs more memory than there is; raised before the rest is received.
        Overloaded: Other requests leave too little memory.
        UnsupportedMediaType: It has a transfer coding other than chunked.
        Malformed: Content-Length is not a number.
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
    """Whether the caller has hung up: one step of ASGI's receive, which returns at once where it has, else waits."""
    step: Any = receive()
    try:
        step.send(None)
    except StopIteration as done:
        return bool(done.value["type"] == "http.disconnect")
    step.close()
    return False


def coding_of(headers: dict[bytes, bytes]) -> bytes:
    """The content coding of the body, in lower case.

    Raises:
        UnsupportedMediaType: It is neither gzip nor deflate nor identity, or there are several.
    """
    if b"content-encoding" not in headers:
        return IDENTITY
    coding = headers[b"content-encoding"].strip().lower() or IDENTITY
    if coding != IDENTITY and coding not in WINDOW_BITS:
        raise UnsupportedMediaType("Content-Encoding must be gzip, deflate or identity, one of them alone")
    return coding


def accepted_codings(header: str) -> list[str]:
    """The content codings `gzip` and `deflate` that an Accept-Encoding header names, best first.

    A header longer than `LONGEST_LIST` counts as one without.
    """
    if len(header) > LONGEST_LIST or not any(name in header for name in ("gzip", "deflate")):
        return []
    known = parse_accept_header(header)
    return sorted((name for name in ("gzip", "deflate") if known[name] > 0), key=lambda name: -known[name])


def deflated(content: Body, coding: str) -> bytes:
    """Compress a body, with little effort: arrays of floats hardly shrink with more."""
    stream = zlib.compressobj(1, wbits=WINDOW_BITS[coding.encode()])
    return stream.compress(content) + stream.flush()


def inflated(body: Body, coding: bytes, limit: Limit, meter: Meter) -> bytearray:
    """Decompress a body; `deflate` is read with and without zlib's header.

    Raises:
        TooLarge: The decompressed body is above the limit, or needs too much memory.
        Unreadable: It is not of that coding, or is cut short.
        DeadlinePassed: The request's time is up.

    Source:
        RFC 9110, section 8.4.1.2.
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
    """zlib's parameter. Raw deflate lacks the check bits of zlib's header (RFC 1950, section 2.2)."""
    raw = coding == b"deflate" and (len(body) < 2 or body[0] & 15 != zlib.DEFLATED or (body[0] << 8 | body[1]) % 31)
    return RAW_DEFLATE if raw else WINDOW_BITS[coding]
