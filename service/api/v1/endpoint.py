"""`/v1` as ASGI: reads a request into an `Invocation`, runs it, and writes its answer."""

from __future__ import annotations

import math
import time
from functools import lru_cache, partial
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from starlette.types import Receive, Scope

from service.api.face import Face
from service.api.invoke import (
    LOOP_BINARY_BYTES,
    LOOP_BINARY_NUMBERS,
    LOOP_BYTES,
    LOOP_NUMBERS,
    PART_ROWS,
    Caller,
    Context,
    Invocation,
    admitted,
    invoke,
    invoke_events,
    invoke_parts,
    prepare,
    written_by,
)
from service.api.memory import Share
from service.api.reply import Reply, events_reply, parts_reply, whole_reply
from service.api.request import (
    IDENTITY,
    body_limits,
    coding_of,
    disconnected,
    fields,
    inflated,
    read_body,
    timeout_of,
)
from service.api.validation import intake_of, options_of
from service.codecs import JSON
from service.codecs.codec import Codec
from service.codecs.image import PNG, TIFF
from service.codecs.negotiation import acceptable, named, reader, write
from service.codecs.payload import Answer, Body, Meter, Payload
from service.codecs.source import LEVELS, Source
from service.contract.images import MODES
from service.errors import InvalidOption
from service.operations.operation import Operation
from service.runtime.model import Model
from service.runtime.tiling import Levels

REMEMBERED = 512
"""Longest query string and headers, in bytes, of a head that is kept."""
MOST_HEADS = 1024
"""Heads that an operation keeps."""
TELLING = (
    b"content-type", b"content-encoding", b"transfer-encoding", b"accept", b"x-fingerprint", b"x-timeout-ms",
)  # fmt: skip
"""Headers that a head is read from."""


class Head(NamedTuple):
    """What the query string and the headers of a request say. Clients repeat it, so it is read once and kept.

    Attributes:
        query: The query string.
        options: The options in it.
        fingerprint: The header X-Fingerprint.
        content_type: The header Content-Type.
        codec: Reads the body; None without a body.
        coding: The content coding of the body.
        accept: The header Accept.
        accepted: The codecs that may write the answer, best first.
        timeout_s: Seconds from the arrival of the body to the deadline.
        array: Whether the body is one binary array of the model's shape, which needs no parsing and no resizing.
    """

    query: bytes
    options: Any
    fingerprint: bytes | None
    content_type: str
    codec: Codec | None
    coding: bytes
    accept: str
    accepted: tuple[Codec, ...]
    timeout_s: float
    array: bool

    def answered_as(self, source: Source | None) -> Head:
        """The head with the codecs for a picture file that was sent by itself or in a form.

        Its first bytes decide its format, and only then the format of an answer that Accept leaves open.
        """
        if source is None or self.codec is None or self.codec is JSON:
            return self
        return self._replace(accepted=acceptable(self.accept, named(source.media_type)))


class OperationApp(Face):
    """Serves one operation below `/v1`.

    Args:
        operation: The operation.
        context: The parts that all faces share.
    """

    def __init__(self, operation: Operation, context: Context) -> None:
        super().__init__(context)
        self.operation = operation
        self._heads: dict[tuple[Any, ...], Head] = {}
        self._remembered = lru_cache(MOST_HEADS)(lambda query: self._options(_pairs(query)))
        self._limit, self._json_limit = body_limits(context.settings)

    async def reply(self, scope: Scope, receive: Receive, share: Share, served: dict[str, Any]) -> Reply | None:
        """As in `Face`."""
        path, operation = scope["path_params"], self.operation
        model = self.find(operation, path.get("model"), path.get("version"), served)
        headers, query = fields(scope["headers"]), scope["query_string"]
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        codec = named(content_type)
        if b"expect" in headers:
            self._check_early(codec, content_type, headers, query)
        body = await read_body(receive, headers, self._json_limit if codec is JSON else self._limit, share)
        if body is None:
            return None
        key = (bool(body), query, *map(headers.get, TELLING))
        head = self._heads.get(key)
        if head is None:
            head = self._head(headers, query, reader(codec, content_type, body, operation.name, operation.takes))
            if sum(len(told) for told in key[1:] if told) <= REMEMBERED:
                if len(self._heads) >= MOST_HEADS:
                    self._heads.clear()
                self._heads[key] = head
        caller = Caller(time.monotonic() + head.timeout_s, partial(disconnected, receive), share)
        return await self._reply(model, head, body, caller)

    def _head(self, headers: dict[bytes, bytes], query: bytes, codec: Codec | None) -> Head:
        """Read the query string and the headers of a request whose body this codec reads.

        Raises:
            ServiceError: One of them is invalid.
        """
        settings, content_type = self.context.settings, headers.get(b"content-type", b"").decode("latin-1")
        options, coding = self.options_of_query(query), coding_of(headers)
        accept = headers.get(b"accept", b"*/*").decode("latin-1")
        accepted = acceptable(accept, codec)
        timeout_s = timeout_of(headers, settings.timeout_s if accepted[0].events is None else settings.long_timeout_s)
        fingerprint, array = headers.get(b"x-fingerprint"), _is_array(codec, options)
        return Head(query, options, fingerprint, content_type, codec, coding, accept, accepted, timeout_s, array)

    def _check_early(self, codec: Codec | None, content_type: str, headers: dict[bytes, bytes], query: bytes) -> None:
        """Check the headers and the query string before a caller that waits for 100 Continue sends the body.

        Raises:
            UnsupportedMediaType: No codec reads the body.
            InvalidOption: The query string is invalid.
        """
        if headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
            reader(codec, content_type, b"to come", self.operation.name, self.operation.takes)
        coding_of(headers)
        self.options_of_query(query)

    async def _reply(self, model: Model, head: Head, body: Body, caller: Caller) -> Reply:
        """Decode the body, run the operation, and write the answer in the best accepted format that can hold it."""
        context, size = self.context, len(body)
        small = size <= LOOP_BYTES or (size <= LOOP_BINARY_BYTES and head.array and model.free is None)
        read, what = partial(self._invocation, model, head, body, caller), (head.codec or JSON).media_type
        in_loop = small and head.coding == IDENTITY
        invocation, head = await prepare(context, read, caller, what, in_loop=in_loop)
        rows, best = len(invocation.inputs.rows), head.accepted[0]
        if best.events is not None:
            return await events_reply(best, model, invoke_events(context.submit, invocation), rows)
        parts = best.header is not None and self.operation.row_wise and invocation.inputs.tiling is None
        if parts and rows > PART_ROWS:
            reply = await parts_reply(best, invoke_parts(context.submit, invocation, PART_ROWS), rows)
            if reply is not None:
                return reply
            caller.share.need(rows * invocation.row_bytes)
        answer = await invoke(context.submit, invocation)
        work = partial(write, answer, head.accepted, head.accept)
        written, content = await written_by(context, work, answer, caller, _most_in_loop(best, answer))
        return whole_reply(written.media_type, answer, content, rows)

    def _invocation(
        self, model: Model, head: Head, body: Body, caller: Caller, meter: Meter
    ) -> tuple[Invocation, Head]:
        """Decompress, decode and check the body. Runs in the event loop or in a thread.

        Raises:
            ServiceError: The codec or a check refuses the body.
        """
        operation, context, codec, options = self.operation, self.context, head.codec, head.options
        if head.coding != IDENTITY:
            body = inflated(body, head.coding, self._json_limit if codec is JSON else self._limit, meter)
        intake = intake_of(operation, model, options, meter, context.settings.tile_pixels)
        payload = codec.read(body, head.content_type, intake) if codec and codec.read else Payload(None)
        if payload.options:
            options = self._options({**_pairs(head.query), **payload.options})
        if payload.source is not None:
            head = head.answered_as(payload.source)
        best = head.accepted[0]
        in_parts = operation.row_wise and _is_array(best, options)
        levels = None if model.free is None else partial(self._levels, best, options)
        invocation = admitted(
            context, operation, model, payload, options, caller, intake, head.fingerprint, in_parts=in_parts,
            levels_of=levels,
        )  # fmt: skip
        return invocation, head

    def _levels(
        self, best: Codec, options: Any, model: Model, source: Source | None, size: tuple[int, int]
    ) -> Levels | None:
        """Type of levels in which images are computed, because a large picture is written of them; None for floats."""
        alone = options.images_alone and any(tensor.name == "images" for tensor in self.operation.outputs)
        large = math.prod(size) > self.context.settings.tile_pixels
        if not (best in (PNG, TIFF) and large and alone and model.manifest.channels in MODES):
            return None
        if source is not None and source.scale is not None:
            return None
        return "uint16" if source is not None and source.kind == LEVELS[1] else "uint8"

    def options_of_query(self, query: bytes) -> Any:
        """Parse the options of a query string.

        Raises:
            InvalidOption: One is unknown, invalid or named twice.
        """
        return self._remembered(query) if len(query) <= REMEMBERED else self._options(_pairs(query))

    def _options(self, named: Any) -> Any:
        return options_of(self.operation, named, self.context.settings.max_draws)


def _is_array(codec: Codec | None, options: Any) -> bool:
    """Whether a body is one binary array of the model's shape, which needs no parsing and no resizing."""
    return codec is not None and codec.header is not None and options.resizing is None


def _most_in_loop(codec: Codec, answer: Answer) -> int:
    """Most numbers of an answer that the event loop writes."""
    if codec is TIFF:
        return 0
    binary = codec.header is not None and len({array.shape for array in answer.outputs.values()}) == 1
    return LOOP_BINARY_NUMBERS if binary else LOOP_NUMBERS


def _pairs(query: bytes) -> dict[str, str]:
    """Options by name in a query string.

    Raises:
        InvalidOption: A name occurs twice.
    """
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InvalidOption("the query string names an option twice; send each once")
    return found
