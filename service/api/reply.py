"""HTTP replies: an answer sent whole, in parts or as events, and errors as problems; for every HTTP face."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import lru_cache
from traceback import clear_frames
from typing import Any, NamedTuple

from starlette.types import Message, Send

from service.api import problems
from service.api.progress import Event
from service.codecs.codec import Codec, EventForm
from service.codecs.payload import Answer, Written, single_array
from service.errors import ServiceError
from service.observability.metrics import server_timing
from service.operations.operation import IDENTIFYING
from service.runtime.model import Model

WHOLE = "vae.whole_answer"
"""ASGI extension that `server.protocol` describes. Other servers need bytes as bodies; Ray Serve pickles them."""
ONE_WRITE = 2**16
"""Most bytes of an answer that are joined to its head."""
HEADER_NUMBERS = 16
"""Longer lists are not repeated in a header."""
NAMED = ("seed", "binarisation", "std_scale")
"""Fields of an answer that have a header of their own."""

Header = tuple[bytes, bytes]
Headers = list[Header]

UNBUFFERED: Headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
"""Make proxies pass each event on at once."""


class Reply(NamedTuple):
    """An HTTP response, and how it is counted.

    Attributes:
        status: Status code.
        headers: Without Content-Length.
        content: The body, or its beginning where parts follow.
        outcome: `ok` or the code of a problem, for metrics and the access log.
        rows: Rows of the request.
        length: Bytes of the body where parts follow; None where that is unknown.
        parts: The rest of the body.
        events: Set where the parts are events, so that a late error can be sent as one.
        queue_s: Seconds in the queue, where all of the answer has been computed.
        inference_s: Seconds in the model likewise.
    """

    status: int
    headers: Headers
    content: Written
    outcome: str
    rows: int
    length: int | None = None
    parts: AsyncGenerator[bytes | memoryview, None] | None = None
    events: EventForm | None = None
    queue_s: float = 0.0
    inference_s: float = 0.0

    async def send(self, send: Send, *, whole: bool) -> str:
        """Send the response. One that breaks off leaves its connection closed, except that events end with an error.

        Args:
            send: ASGI's.
            whole: Whether the server offers the extension `WHOLE`.

        Returns:
            The outcome: an error may come up after the first byte.
        """
        length = len(self.content) if self.parts is None else self.length
        head = self.headers if length is None else [*self.headers, (b"content-length", b"%d" % length)]
        start: Message = {"type": "http.response.start", "status": self.status, "headers": head}
        if whole and self.parts is None and len(self.content) <= ONE_WRITE:
            start["content"] = self.content
            await send(start)
            return self.outcome
        await send(start)

        def body(content: Written, *, more: bool = False) -> Message:
            return {"type": "http.response.body", "body": content if whole else bytes(content), "more_body": more}

        if self.parts is None:
            await send(body(self.content))
            return self.outcome
        outcome, end = self.outcome, b""
        await send(body(self.content, more=True))
        try:
            async with aclosing(self.parts):
                async for part in self.parts:
                    await send(body(part, more=True))
        except Exception as error:  # noqa: BLE001  # the status has been sent
            _, outcome, content, _ = problems.describe(error)
            if self.events is None:
                return outcome
            end = self.events.frame("error", content)
        await send(body(end))
        return outcome


def whole_reply(media_type: str, answer: Answer, content: Written, rows: int, further: Sequence[Header] = ()) -> Reply:
    """A whole answer.

    Args:
        media_type: That of the body.
        answer: What the body holds.
        content: The body.
        rows: Rows of the request.
        further: Headers beside those that describe every answer.
    """
    head = [*headers_of(media_type, answer, answer.inference_s), *further]
    return Reply(200, head, content, "ok", rows, queue_s=answer.queue_s, inference_s=answer.inference_s)


def refusal(error: Exception, path: str) -> Reply:
    """An error in a request for a path. Its traceback is cleared: it holds the body and refers back to the error."""
    status, code, content, headers = problems.describe(error, path)
    head = [(name.encode(), value.encode()) for name, value in headers.items()]
    outcome = error.outcome if isinstance(error, ServiceError) else ""
    clear_frames(error.__traceback__)
    return Reply(status, head, content, outcome or code, 0)


async def parts_reply(codec: Codec, parts: AsyncGenerator[Answer, None], rows: int) -> Reply | None:
    """Answers of some rows each, sent one by one as one array.

    Args:
        codec: Of a binary format.
        parts: Computed one ahead; the first is awaited here, so that its errors are problems.
        rows: Of all parts.

    Returns:
        The reply; None where the format cannot hold the answer.
    """
    first = await anext(parts)
    array = single_array(first.outputs)
    if array is None:
        await parts.aclose()
        return None
    assert codec.header is not None
    head = codec.header((rows, *array.shape[1:]))
    length = len(head) + rows * array[0].nbytes
    sent = _arrays(array.data.cast("B"), parts)
    return Reply(200, headers_of(codec.media_type, first, None), head, "ok", rows, length, sent)


async def _arrays(first: memoryview, parts: AsyncGenerator[Answer, None]) -> AsyncGenerator[memoryview, None]:
    async with aclosing(parts):
        yield first
        async for part in parts:
            array = single_array(part.outputs)
            assert array is not None  # as the first
            yield array.data.cast("B")


async def events_reply(codec: Codec, model: Model, events: AsyncGenerator[Event | None, None], rows: int) -> Reply:
    """Events, sent one by one. The first is awaited here, so that errors before it are problems."""
    manifest = model.manifest
    head = [*_described(codec.media_type, manifest.name, manifest.version, manifest.fingerprint), *UNBUFFERED]
    assert codec.events is not None
    parts = _framed(codec.events, await anext(events), events)
    return Reply(200, head, b"", "ok", rows, parts=parts, events=codec.events)


async def _framed(
    form: EventForm, event: Event | None, further: AsyncGenerator[Event | None, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(further):
        while True:
            for piece in form.event(event.kind, event.answer) if event else (form.keep_alive,):
                yield piece
                await asyncio.sleep(0)  # other requests come between the pieces of a large event
            try:
                event = await anext(further)
            except StopAsyncIteration:
                return


def headers_of(media_type: str, answer: Answer, inference_s: float | None) -> Headers:
    """The headers that describe an answer.

    Args:
        media_type: That of the body.
        answer: Its fields have the names of the JSON answer.
        inference_s: Seconds in the model, where all of it has run.
    """
    about = answer.about
    named = _described(media_type, *map(about.__getitem__, IDENTIFYING), *answer.outputs)
    head = [*named, (b"server-timing", server_timing(answer.queue_s, inference_s).encode())]
    if len(about) == len(IDENTIFYING):  # the usual case
        return head
    head += [(b"x-" + name.replace("_", "-").encode(), str(about[name]).encode()) for name in NAMED if name in about]
    if "notes" in about:
        head.append((b"x-note", ", ".join(map(_noted, about["notes"])).encode("ascii", "replace")))
    if "level" in about and len(about["level"]) <= HEADER_NUMBERS:
        head.append((b"x-level", ",".join(f"{value:.4g}" for value in about["level"]).encode()))
        if "noise" in about:
            head.append((b"x-noise", ",".join(about["noise"]).encode()))
    return head


def _noted(note: Mapping[str, Any]) -> str:
    """A note as an item of a list of structured fields (RFC 9651): code;rows="0 1";detail="..."."""
    rows = " ".join(map(str, note["rows"][:HEADER_NUMBERS])) + (" ..." if len(note["rows"]) > HEADER_NUMBERS else "")
    detail = note["detail"].replace("\\", "\\\\").replace('"', '\\"')
    return f'{note["code"]};rows="{rows}";detail="{detail}"'


@lru_cache(1024)
def _described(media_type: str, model: str, version: str, fingerprint: str, *outputs: str) -> Headers:
    """The headers that many answers share."""
    return [
        (b"content-type", media_type.encode()),
        (b"x-model", model.encode()),
        (b"x-model-version", version.encode()),
        (b"x-fingerprint", fingerprint.encode()),
        *([(b"x-outputs", ",".join(outputs).encode())] if outputs else []),
    ]
