"""A request's body, and whether its sender is still there."""

from __future__ import annotations

from typing import Any

from starlette.types import Receive

from service.codecs import Body
from service.errors import Malformed, TooLarge, UnsupportedMediaType

LONGEST_LENGTH = 19
"""Digits in a Content-Length; more are above every limit."""


async def read_body(receive: Receive, headers: dict[bytes, bytes], limit: int) -> Body | None:
    """The whole body; None where the caller has gone.

    Raises: TooLarge before the rest is read, UnsupportedMediaType for a compressed body, Malformed for a length that
        is none.
    """
    coded = headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked"
    if coded or headers.get(b"content-encoding", b"identity") != b"identity":
        raise UnsupportedMediaType("compressed bodies are not read; send it without Content-Encoding")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit():
        raise Malformed("Content-Length must be a whole number")
    if len(length) > LONGEST_LENGTH or int(length) > limit:
        raise _too_large(limit)
    message = await receive()
    body: Body = message.get("body", b"")
    if message.get("more_body"):
        body = bytearray(body)  # grows in place, so that a large body is in memory once
    while message.get("more_body") and len(body) <= limit:
        message = await receive()
        body += message.get("body", b"")
    if len(body) > limit:
        raise _too_large(limit)
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


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is above VAE_MAX_BODY_BYTES ({limit}); send fewer rows, or raise it")
