"""`/v1` as ASGI: reads a request into an `Invocation`, runs it, and writes its answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from service.api.invoke import Caller, Context, Invocation, invoke, invoke_events, invoke_parts, prepare
from service.api.memory import Share, answer_bytes
from service.api.reply import WHOLE, Reply, events_reply, headers_of, parts_reply, refusal
from service.api.request import IDENTITY, Limit, coding_of, deadline_of, disconnected, fields, inflated, read_body
from service.api.validation import admit, variant_of
from service.codecs import JSON
from service.codecs.codec import Codec
from service.codecs.image import PNG, TIFF
from service.codecs.negotiation import acceptable, named, reader, write
from service.codecs.payload import Body, Intake, Meter, Payload, scaled
from service.codecs.source import LEVELS, Source
from service.contract.images import MODES
from service.errors import InvalidOption, WrongModel, quoted
from service.operations.inference.latent import BLOCK_ROWS
from service.operations.operation import LatentOptions, Operation
from service.runtime.model import Model
from service.runtime.tiling import Levels
from service.settings import Settings

REMEMBERED = 256
"""Longest query string, in bytes, whose options are cached."""
PART_ROWS = 4 * BLOCK_ROWS
"""Rows of a part. A larger binary answer is sent in parts, which bounds its memory."""
LOOP_BYTES = 2**16
"""Largest body that the event loop decodes; a larger one is decoded in a thread."""
LOOP_BINARY_BYTES = 2**20
"""The same for binary arrays, which are not parsed."""
LOOP_NUMBERS = 2**16
"""Most numbers of an answer that the event loop writes; a larger one is written in a thread."""


class Request(NamedTuple):
    """One request, received and not yet decoded.

    Attributes:
        model: The version that the path names.
        query: The query string.
        options: The options in the query string.
        fingerprint: The header X-Fingerprint.
        content_type: The header Content-Type.
        codec: Reads the body; None without a body.
        coding: The content coding of the body.
        body: The body, still encoded.
        accept: The header Accept.
        accepted: The codecs that may write the answer, best first.
        caller: Deadline, connection and memory of the request.
    """

    model: Model
    query: bytes
    options: Any
    fingerprint: bytes | None
    content_type: str
    codec: Codec | None
    coding: bytes
    body: Body
    accept: str
    accepted: tuple[Codec, ...]
    caller: Caller

    @property
    def best(self) -> Codec:
        """The first of the accepted codecs. JSON if there is none; `write` then refuses, once the outputs are known."""
        return self.accepted[0] if self.accepted else JSON

    def answered_as(self, source: Source | None) -> Request:
        """The request with the codecs for a picture file that was sent by itself or in a form.

        Its first bytes decide its format, and only then the format of an answer that Accept leaves open.
        """
        if source is None or self.codec is None or self.codec is JSON:
            return self
        return self._replace(accepted=acceptable(self.accept, named(source.media_type)))


class OperationApp:
    """Serves one operation as an ASGI application.

    Args:
        operation: The operation.
        context: The parts that all faces share.
    """

    def __init__(self, operation: Operation, context: Context) -> None:
        self.operation = operation
        self.context = context
        self._remembered = lru_cache(1024)(lambda query: self._options(_pairs(query)))
        self._limit, self._json_limit = body_limits(context.settings)
        self._whole = not context.settings.tracing  # tracing ends a span at the message with the body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Errors become problems (RFC 9457)."""
        share = Share(self.context.memory)
        path, label = scope["path_params"], "unknown"
        try:
            try:
                model = self.context.repository.find(path.get("model"), path.get("version"), self.operation.name)
                label = model.manifest.name
                if not model.others:
                    self.operation.check_offered(model, self.context.repository.models)
                request = await self._received(model, scope, receive, share)
                if request is None:
                    return
                reply = await self._reply(request)
            except Exception as error:  # noqa: BLE001  # every error becomes an answer, and only here
                reply = refusal(error)
            served: dict[str, Any] = {
                "model": label,
                "operation": self.operation.name,
                "outcome": reply.outcome,
                "rows": reply.rows,
            }
            scope["served"] = served  # for the access log and the trace
            whole = self._whole and WHOLE in scope.get("extensions", ())
            served["outcome"] = await reply.send(send, whole=whole)
            self.context.telemetry.request(**served)
        finally:
            share.give_back()

    async def _received(self, model: Model, scope: Scope, receive: Receive, share: Share) -> Request | None:
        """Receive the whole request; None if the caller disconnects first."""
        headers, query, operation = fields(scope["headers"]), scope["query_string"], self.operation
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        codec = named(content_type)
        if b"expect" in headers:
            self._check_early(codec, content_type, headers, query)
        body = await read_body(receive, headers, self._json_limit if codec is JSON else self._limit, share)
        if body is None:
            return None
        codec = reader(codec, content_type, body, operation.name, operation.takes)
        options = self.options_of_query(query)
        coding = coding_of(headers) if b"content-encoding" in headers else IDENTITY
        fingerprint, accept = headers.get(b"x-fingerprint"), headers.get(b"accept", b"*/*").decode("latin-1")
        accepted = acceptable(accept, codec)
        best, settings = accepted[0] if accepted else JSON, self.context.settings
        timeout_s = settings.timeout_s if best.events is None else settings.long_timeout_s
        caller = Caller(deadline_of(headers, timeout_s), partial(disconnected, receive), share)
        return Request(model, query, options, fingerprint, content_type, codec, coding, body, accept, accepted, caller)

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

    async def _reply(self, request: Request) -> Reply:
        """Decode the body, run the operation, and write the answer in the best accepted format that can hold it."""
        context, codec, caller, size = self.context, request.codec, request.caller, len(request.body)
        binary = request.model.manifest.size is None and _is_array(codec, request.options)
        small = size <= LOOP_BYTES or (size <= LOOP_BINARY_BYTES and binary)
        read, what = partial(self._invocation, request), (codec or JSON).media_type
        invocation = await prepare(context, read, caller, what, in_loop=small and request.coding == IDENTITY)
        request = request.answered_as(invocation.source)
        rows, best = len(invocation.inputs.rows), request.best
        if best.events is not None:
            return await events_reply(best, request.model, invoke_events(context.submit, invocation), rows)
        parts = best.header is not None and self.operation.row_wise and invocation.inputs.tiling is None
        if parts and rows > PART_ROWS:
            reply = await parts_reply(best, invoke_parts(context.submit, invocation, PART_ROWS), rows)
            if reply is not None:
                return reply
            caller.share.need(rows * invocation.row_bytes)
        answer = await invoke(context.submit, invocation)
        if best is TIFF or sum([array.size for array in answer.outputs.values()]) > LOOP_NUMBERS:
            work = partial(write, answer, request.accepted, request.accept)
            written, content = await context.offload.run(work, caller.share, caller.deadline, caller.gone)
        else:
            written, content = write(answer, request.accepted, request.accept)
        return Reply(200, headers_of(written, answer, answer.inference_s), content, "ok", rows)

    def _invocation(self, request: Request, meter: Meter) -> Invocation:
        """Decompress, decode and check the body. Runs in the event loop or in a thread.

        Raises:
            ServiceError: The codec or a check refuses the body.
        """
        model, operation, codec, options = request.model, self.operation, request.codec, request.options
        body, share = request.body, request.caller.share
        if request.coding != IDENTITY:
            body = inflated(body, request.coding, self._json_limit if codec is JSON else self._limit, meter)
        intake = self._intake(model, options, meter)
        payload = codec.read(body, request.content_type, intake) if codec and codec.read else Payload(None)
        if payload.options:
            options = self._options({**_pairs(request.query), **payload.options})
        payload = scaled(payload, options.scaling, meter)
        model = variant_of(operation, model, payload, options)
        operation.check_offered(model, self.context.repository.models, options)
        _check_fingerprint(model, request.fingerprint, options)
        if intake.float_pixels is not None and payload.array is not None and intake.keeps_levels(payload.array):
            kept = 2 * (payload.array.nbytes + (0 if payload.mask is None else payload.mask.nbytes))  # padded too
            share.keep(kept + (payload.source.nbytes if payload.source else 0))
        row_bytes, levels, best = 0, None, request.answered_as(payload.source).best

        def room(rows: int, size: tuple[int, int] | None) -> None:
            nonlocal row_bytes, levels
            levels = None if size is None else self._levels(best, payload.source, model, options, size)
            row_bytes = answer_bytes(model, options, 1, size, levels=levels)
            if rows > 2 * PART_ROWS and operation.row_wise and _is_array(best, options):  # two parts at a time
                rows = 2 * PART_ROWS
            share.need(rows * row_bytes)

        most = self.context.settings.max_request_rows
        inputs = admit(operation, model, payload, options, most, room, intake.float_pixels)
        inputs = inputs._replace(levels=levels)
        if operation.check is not None:
            operation.check(model, inputs, options)
        source = payload.source
        if source is not None and options.resizing in ("pad", "crop"):
            source = source._replace(how=options.resizing)
        return Invocation(model, operation, inputs, options, request.caller, row_bytes=row_bytes, source=source)

    def _intake(self, model: Model, options: Any, meter: Meter) -> Intake:
        """What the codec reads for a model."""
        operation, variants = self.operation, model.variants
        shape = operation.row_shape(model, options)
        keeps_alpha = operation.observed and not operation.masked
        intake = Intake(operation.takes or "", shape, meter, operation.masked, operation.or_latents)
        intake = intake._replace(keeps_alpha=keeps_alpha)
        if model.free is None and len(variants) == 1:
            return intake
        float_pixels = None if model.free is None else self.context.settings.tile_pixels
        return intake._replace(variants=tuple(variants) if len(variants) > 1 else (), float_pixels=float_pixels)

    def _levels(
        self, best: Codec, source: Source | None, model: Model, options: Any, size: tuple[int, int]
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

    def _options(self, pairs: Mapping[str, Any]) -> Any:
        try:
            options = self.operation.options.model_validate(pairs)
        except ValidationError as error:
            known = ", ".join(self.operation.options.model_fields) or "none"
            wrong = error.errors()[:3]
            problem = "; ".join(f"{quoted('.'.join(map(str, one['loc'])))}: {one['msg']}" for one in wrong)
            raise InvalidOption(f"{problem} (options of {self.operation.name}: {known})") from error
        limit = self.context.settings.max_draws
        if options.multiplicity > limit:
            raise InvalidOption(f"draws is {options.multiplicity}, VAE_MAX_DRAWS is {limit}")
        return options


def _is_array(codec: Codec | None, options: Any) -> bool:
    """Whether a body is one binary array of the model's shape, which needs no parsing and no resizing."""
    return codec is not None and codec.header is not None and options.resizing is None


def body_limits(settings: Settings) -> tuple[Limit, Limit]:
    """The limit of bodies in general, and that of JSON, whose parsing delays every other request."""
    advice = "send arrays as application/x-npy or application/octet-stream and pictures as files, or raise it"
    most, most_json = settings.max_body_bytes, settings.max_json_bytes
    limit = Limit(most, "VAE_MAX_BODY_BYTES", "send fewer rows, or raise it")
    return limit, min(limit, Limit(most_json, "VAE_MAX_JSON_BYTES", advice), key=lambda one: one.size)


def _check_fingerprint(model: Model, header: bytes | None, options: Any) -> None:
    """Refuse a request for the fingerprint of another model.

    Raises:
        WrongModel: The header X-Fingerprint or the option `fingerprint` names another one.
    """
    option = options.fingerprint if isinstance(options, LatentOptions) else None
    if header is None and option is None:
        return
    manifest = model.manifest
    for fingerprint in (None if header is None else header.decode("latin-1"), option):
        if fingerprint is not None and fingerprint != manifest.fingerprint:
            raise WrongModel(
                f"the request is for the model with fingerprint {quoted(fingerprint)}, but {manifest.name} version "
                f"{manifest.version} has {manifest.fingerprint}; ask the model that gave the latents, or encode again"
            )


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
