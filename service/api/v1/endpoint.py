"""What serves an operation: a lean ASGI function from the request's bytes to the answer's."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import lru_cache, partial
from traceback import clear_frames
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from service.api import problems
from service.api.body import IDENTITY, WHOLE, Limit, coding_of, disconnected, inflated, read_body
from service.api.memory import Memory, Share, answer_bytes
from service.api.offload import Offload
from service.api.progress import Event, watched
from service.api.validation import admit
from service.codecs import EVENTS, HEADERS, READERS, Answer, Body, EventForm, Intake, Meter, Payload, single_array
from service.codecs.negotiation import JSON, acceptable, fields, form_of, write
from service.errors import (
    CallerGone,
    DeadlinePassed,
    Deferred,
    InvalidOption,
    ReaderFault,
    ServiceError,
    WrongModel,
    quoted,
)
from service.observability.metrics import Telemetry, server_timing
from service.observability.request_ids import request_id
from service.operations.inference.latent import BLOCK_ROWS
from service.operations.inference.vae import Observe, Result
from service.operations.operation import Inputs, LatentOptions, Operation, Rows
from service.repository.repository import Repository
from service.runtime.model import Model
from service.runtime.program import Submit
from service.settings import Settings

log = logging.getLogger(__name__)

NAMED = ("seed", "binarisation")
"""What is said about an answer, in a header of its own."""
HEADER_NUMBERS = 16
"""Lists longer than this are not repeated in a header."""
REMEMBERED = 256
"""Longer query strings are nobody's, and are not remembered."""
PART_ROWS = 4 * BLOCK_ROWS
"""Binary answers of more rows are sent in parts of this many, so that they need no more memory."""

LOOP_BYTES = 2**16
"""Bodies that the event loop reads; larger ones are read in a thread."""
LOOP_BINARY_BYTES = 2**20
"""The same for arrays in binary, which are read without parsing."""
LOOP_NUMBERS = 2**16
"""Numbers of an answer that the event loop writes; larger ones are written in a thread."""
ONE_WRITE = 2**16
"""Bytes of an answer that are joined to its head."""
LONGEST_TIMEOUT = 12
"""Digits of X-Timeout-Ms."""

T = TypeVar("T")
Headers = list[tuple[bytes, bytes]]

UNBUFFERED: Headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
"""Of events: proxies are to pass each on as it comes."""


@dataclass(frozen=True)
class Context:
    """What every operation shares: one an application."""

    settings: Settings
    repository: Repository
    submit: Submit
    telemetry: Telemetry
    memory: Memory
    offload: Offload


class Call(NamedTuple):
    """One request."""

    model: Model
    query: bytes
    headers: dict[bytes, bytes]
    body: Body
    submit: Submit
    deadline: float
    """By time.monotonic()."""
    gone: Callable[[], bool]
    share: Share
    content_type: str
    accept: str

    def check_time(self) -> None:
        """Raise DeadlinePassed where its time is up."""
        if time.monotonic() > self.deadline:
            raise DeadlinePassed


Parsed = tuple[str | None, Any, Inputs, str]
"""A request read and admitted: the form of its body, options, rows, and the form that its answer takes first."""


class Reply(NamedTuple):
    """What goes back, and how it is counted.

    Parts may follow the content: `length` bytes in all or, where nobody knows how many, events of that form.
    """

    status: int
    headers: Headers
    content: Body
    outcome: str
    rows: int
    length: int | None = None
    parts: AsyncGenerator[bytes | memoryview, None] | None = None
    events: EventForm | None = None


class OperationApp:
    """Serves one operation: body to payload to rows to batch to answer to body."""

    def __init__(self, operation: Operation, context: Context) -> None:
        self.operation = operation
        self.context = context
        self._remembered = lru_cache(1024)(lambda query: self._options(_pairs(query)))
        self._limit, self._json_limit = body_limits(context.settings)
        self._whole = not context.settings.tracing  # spans end with the body's message

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; every error is answered as a problem."""
        share = Share(self.context.memory)
        try:
            await self._serve(scope, receive, send, share)
        finally:
            share.give_back()

    async def _serve(self, scope: Scope, receive: Receive, send: Send, share: Share) -> None:
        path, label = scope["path_params"], "unknown"
        try:
            model = self.context.repository.find(path.get("model"), path.get("version"))
            label = model.manifest.name
            self.operation.check_offered(model)
            headers = fields(scope["headers"])
            if b"expect" in headers:
                self._check_early(headers, scope["query_string"])
            content_type = headers.get(b"content-type", b"").decode("latin-1")
            body = await read_body(receive, headers, self._limit_of(content_type), share)
            if body is None:
                return
            gone, deadline = partial(disconnected, receive), self._deadline(headers)
            submit = partial(self.context.submit, deadline=deadline, gone=gone)
            accept = headers.get(b"accept", b"*/*").decode("latin-1")
            query = scope["query_string"]
            call = Call(model, query, headers, body, submit, deadline, gone, share, content_type, accept)
            reply = await self._answer(call)
        except Exception as error:  # noqa: BLE001  # the one place where errors become answers
            reply = _refusal(error)
            clear_frames(error.__traceback__)  # they hold the body, in a cycle with the error
        served: dict[str, Any] = {
            "model": label,
            "operation": self.operation.name,
            "outcome": reply.outcome,
            "rows": reply.rows,
        }
        scope["served"] = served  # for the access log and the trace
        whole = self._whole and WHOLE in scope.get("extensions", ())
        served["outcome"] = await self._send(reply, send, whole=whole)
        self.context.telemetry.request(**served)

    def _check_early(self, headers: dict[bytes, bytes], query: bytes) -> None:
        """Refuse what its head tells before the body is sent, for a caller that waits for 100 Continue.

        Raises: UnsupportedMediaType, InvalidOption.
        """
        if headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
            form_of(headers.get(b"content-type", b"").decode("latin-1"), b"to come", self.operation)
        coding_of(headers)
        self.options_of_query(query)

    async def _answer(self, call: Call) -> Reply:
        model, operation = call.model, self.operation
        form, options, inputs, best = self._parse(call) or await self._parse_apart(call)
        if best in EVENTS:
            return await self._watch(call, inputs, options, best)
        if best in HEADERS and len(inputs.rows) > PART_ROWS and inputs.tiling is None and operation.row_wise:
            reply = await self._stream(call, inputs, options, best)
            if reply is not None:
                return reply
            call.share.need(answer_bytes(model, options, len(inputs.rows)))
        result = await operation.perform(model, call.submit, inputs, options)
        answer = _answer(model, result)
        if numbers(answer) > LOOP_NUMBERS:
            answer_form, content = await self._offloaded(call, partial(write, answer, call.accept, form))
        else:
            answer_form, content = write(answer, call.accept, form)
        return Reply(200, _headers(answer_form, answer.about, result), content, "ok", len(inputs.rows))

    def _parse(self, call: Call) -> Parsed | None:
        """Read the body in the event loop; None where that may take long."""
        form, options = form_of(call.content_type, call.body, self.operation), self.options_of_query(call.query)
        arrays = form in HEADERS and options.resizing is None
        if len(call.body) > (LOOP_BINARY_BYTES if arrays else LOOP_BYTES) or b"content-encoding" in call.headers:
            return None
        try:
            return self._read(call, form, options, in_loop=True)
        except Deferred:
            return None

    async def _parse_apart(self, call: Call) -> Parsed:
        """Read the body in a thread."""
        form, options = form_of(call.content_type, call.body, self.operation), self.options_of_query(call.query)
        parsed = await self._offloaded(call, partial(self._read, call, form, options, coding_of(call.headers)))
        call.share.keep(parsed[2].nbytes)
        return parsed

    async def _offloaded(self, call: Call, work: Callable[[], T]) -> T:
        return await self.context.offload.run(work, call.share, call.deadline, call.gone)

    def _read(
        self, call: Call, form: str | None, options: Any, coding: bytes = IDENTITY, *, in_loop: bool = False
    ) -> Parsed:
        """Decompress, read, admit. Runs in the event loop or in a thread.

        Raises:
            ReaderFault: Something raised what is no ServiceError; logged with its traceback.
        """
        try:
            return self._admitted(call, form, options, coding, in_loop=in_loop)
        except (ServiceError, MemoryError):
            raise
        except Exception as error:
            log.exception("request %s: reading %s failed", request_id(), form)
            raise ReaderFault(f"the body cannot be read as {form}") from error

    def _admitted(self, call: Call, form: str | None, options: Any, coding: bytes, *, in_loop: bool) -> Parsed:
        model, settings, operation, body, share = (
            call.model,
            self.context.settings,
            self.operation,
            call.body,
            call.share,
        )
        meter = Meter(settings.max_pixels, settings.max_request_rows, share.reserve, call.check_time, in_loop=in_loop)
        if coding != IDENTITY:
            body = inflated(body, coding, self._limit_of(call.content_type), meter)
        shape = operation.row_shape(model, options)
        intake = Intake(operation.takes or "", shape, meter, operation.masked, operation.or_latents)
        payload = READERS[form](body, call.content_type, intake) if form else Payload(None)
        if payload.options:
            options = self._options({**_pairs(call.query), **payload.options})
        _check_fingerprint(model, call.headers.get(b"x-fingerprint"), options)
        best = next(iter(acceptable(call.accept, form)), "")
        in_parts = best in HEADERS and operation.row_wise and options.resizing is None  # resized rows are all there

        def room(rows: int) -> None:
            share.need(answer_bytes(model, options, min(rows, 2 * PART_ROWS) if in_parts else rows))

        inputs = admit(operation, model, payload, options, settings.max_request_rows, room)
        if operation.check is not None:
            operation.check(model, inputs, options)
        return form, options, inputs, best

    async def _watch(self, call: Call, inputs: Inputs, options: Any, form: str) -> Reply:
        """Events, from the first on: what goes wrong before it is a problem like every other."""

        async def run(observe: Observe) -> Result:
            return await self.operation.perform(call.model, call.submit, inputs._replace(observe=observe), options)

        model, events, further = call.model, EVENTS[form], watched(run)
        parts = _framed(model, events, await anext(further), further)
        head = [*_named(form, model.manifest.name, model.manifest.version, model.manifest.fingerprint), *UNBUFFERED]
        return Reply(200, head, b"", "ok", len(inputs.rows), parts=parts, events=events)

    async def _stream(self, call: Call, inputs: Inputs, options: Any, form: str) -> Reply | None:
        """An answer of many rows, sent part by part; None where its form cannot hold it."""
        first = await self.operation.perform(call.model, call.submit, inputs.part(0, PART_ROWS), options)
        array = single_array(first.outputs)
        if array is None:
            return None
        if "seed" in first.about:
            options = options.model_copy(update={"seed": first.about["seed"]})
        about = _about(call.model, first)
        head = HEADERS[form]((len(inputs.rows), *array.shape[1:]))
        length = len(head) + len(inputs.rows) * array[0].nbytes
        headers = _headers(form, about, first, whole=False)
        parts = self._parts(call, inputs, options, array)
        return Reply(200, headers, head, "ok", len(inputs.rows), length, parts)

    async def _parts(self, call: Call, inputs: Inputs, options: Any, first: Rows) -> AsyncGenerator[memoryview, None]:
        """The first part and those after it; each is sent while the next one is computed."""
        submit = partial(self.context.submit, gone=call.gone, begun=True)
        array: Rows | None = first
        for start in range(PART_ROWS, len(inputs.rows), PART_ROWS):
            run = self.operation.perform(call.model, submit, inputs.part(start, PART_ROWS), options)
            ahead = asyncio.ensure_future(run)
            try:
                assert array is not None  # as that of the first part
                yield array.data.cast("B")
                if call.gone():
                    raise CallerGone("the caller hung up")
                array = single_array((await ahead).outputs)
            finally:
                ahead.cancel()
        assert array is not None
        yield array.data.cast("B")

    async def _send(self, reply: Reply, send: Send, *, whole: bool) -> str:
        """Send it, and say how it came out; an answer that breaks off leaves its connection closed."""
        length = len(reply.content) if reply.parts is None else reply.length
        head = reply.headers if length is None else [*reply.headers, (b"content-length", b"%d" % length)]
        start = {"type": "http.response.start", "status": reply.status, "headers": head}
        if whole and reply.parts is None and len(reply.content) <= ONE_WRITE:
            await send({**start, "content": reply.content})
            return reply.outcome
        await send(start)
        if reply.parts is None:
            await send({"type": "http.response.body", "body": reply.content})
            return reply.outcome
        outcome, end = reply.outcome, b""
        await send({"type": "http.response.body", "body": reply.content, "more_body": True})
        try:
            async with aclosing(reply.parts):
                async for part in reply.parts:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except Exception as error:  # noqa: BLE001  # the answer has begun: an event can say so, others are broken off
            _, outcome, content, _ = problems.describe(error)
            if reply.events is None:
                return outcome
            end = reply.events.frame("error", content)
        await send({"type": "http.response.body", "body": end})
        return outcome

    def options_of_query(self, query: bytes) -> Any:
        """The options that a query string names.

        Raises: InvalidOption.
        """
        return self._remembered(query) if len(query) <= REMEMBERED else self._options(_pairs(query))

    def _options(self, named: Mapping[str, Any]) -> Any:
        try:
            options = self.operation.options.model_validate(named)
        except ValidationError as error:
            known = ", ".join(self.operation.options.model_fields) or "none"
            wrong = error.errors()[:3]
            problem = "; ".join(f"{quoted('.'.join(map(str, one['loc'])))}: {one['msg']}" for one in wrong)
            raise InvalidOption(f"{problem} (options of {self.operation.name}: {known})") from error
        limit = self.context.settings.max_draws
        if options.multiplicity > limit:
            raise InvalidOption(f"draws is {options.multiplicity}, VAE_MAX_DRAWS is {limit}")
        return options

    def _limit_of(self, content_type: str) -> Limit:
        """How large a body of that type may be."""
        return self._json_limit if content_type[: len(JSON)].lower() == JSON else self._limit

    def _deadline(self, headers: dict[bytes, bytes]) -> float:
        """When the request's time is up, by time.monotonic().

        Raises: InvalidOption.
        """
        seconds = self.context.settings.timeout_s
        wished = headers.get(b"x-timeout-ms")
        if wished is not None:
            if not wished.isdigit() or len(wished) > LONGEST_TIMEOUT or int(wished) == 0:
                raise InvalidOption("X-Timeout-Ms must be a whole number of milliseconds, from 1 to 12 digits long")
            seconds = min(seconds, int(wished) / 1000.0)
        return time.monotonic() + seconds


def body_limits(settings: Settings) -> tuple[Limit, Limit]:
    """Limits of bodies in general, and of JSON, which holds up every other request while it is parsed."""
    advice = "send arrays as application/x-npy or application/octet-stream and pictures as files, or raise it"
    most, most_json = settings.max_body_bytes, settings.max_json_bytes
    limit = Limit(most, "VAE_MAX_BODY_BYTES", "send fewer rows, or raise it")
    return limit, min(limit, Limit(most_json, "VAE_MAX_JSON_BYTES", advice), key=lambda one: one.size)


def numbers(answer: Answer) -> int:
    """How many numbers it has."""
    size = 0
    for array in answer.outputs.values():
        size += array.size
    return size


def _check_fingerprint(model: Model, header: bytes | None, options: Any) -> None:
    """Refuse what is meant for another model.

    Raises: WrongModel.
    """
    option = options.fingerprint if isinstance(options, LatentOptions) else None
    if header is None and option is None:
        return
    manifest = model.manifest
    for named in (None if header is None else header.decode("latin-1"), option):
        if named is not None and named != manifest.fingerprint:
            raise WrongModel(
                f"the request is for the model with fingerprint {quoted(named)}, but {manifest.name} version "
                f"{manifest.version} has {manifest.fingerprint}; ask the model that gave the latents, or encode again"
            )


def _pairs(query: bytes) -> dict[str, str]:
    """The options in a query string.

    Raises: InvalidOption for one that is there twice.
    """
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    named = dict(pairs)
    if len(named) < len(pairs):
        raise InvalidOption("the query string names an option twice; send each once")
    return named


def _refusal(error: Exception) -> Reply:
    status, code, content, extra = problems.describe(error)
    head = [(b"content-type", problems.MEDIA_TYPE.encode())]
    head += [(name.encode(), value.encode()) for name, value in extra.items()]
    outcome = error.outcome if isinstance(error, ServiceError) else ""
    return Reply(status, head, content, outcome or code, 0)


async def _framed(
    model: Model, form: EventForm, first: Event | None, further: AsyncGenerator[Event | None, None]
) -> AsyncGenerator[bytes, None]:
    """Events as they are sent."""
    event = first
    async with aclosing(further):
        while True:
            for piece in form.event(event.kind, _answer(model, event.result)) if event else (form.keep_alive,):
                yield piece
                await asyncio.sleep(0)  # other requests come between the pieces of a large event
            try:
                event = await anext(further)
            except StopAsyncIteration:
                return


def _answer(model: Model, result: Result) -> Answer:
    """What an operation found, as the codecs write it."""
    return Answer(result.outputs, _about(model, result))


def _about(model: Model, result: Result) -> dict[str, Any]:
    """What is said about an answer, in JSON's fields or in headers."""
    manifest = model.manifest
    return {
        "model": manifest.name,
        "version": manifest.version,
        "fingerprint": manifest.fingerprint,
        **result.about,
    }


def _headers(form: str, about: Mapping[str, Any], result: Result, *, whole: bool = True) -> Headers:
    timing = server_timing(result.trip.queue_s, result.trip.inference_s if whole else None).encode()
    named = _named(form, about["model"], about["version"], about["fingerprint"], *result.outputs)
    head = [*named, (b"server-timing", timing)]
    head += [(b"x-" + name.encode(), str(about[name]).encode()) for name in NAMED if name in about]
    if "notes" in about:
        head.append((b"x-note", ", ".join(map(_noted, about["notes"])).encode("ascii", "replace")))
    if "level" in about and len(about["level"]) <= HEADER_NUMBERS:
        head.append((b"x-level", ",".join(f"{value:.4g}" for value in about["level"]).encode()))
    return head


def _noted(note: Mapping[str, Any]) -> str:
    """A note as an item of a list of structured fields (RFC 9651): code;rows="0 1";detail="..."."""
    rows = " ".join(map(str, note["rows"][:HEADER_NUMBERS])) + (" ..." if len(note["rows"]) > HEADER_NUMBERS else "")
    detail = note["detail"].replace("\\", "\\\\").replace('"', '\\"')
    return f'{note["code"]};rows="{rows}";detail="{detail}"'


@lru_cache(1024)
def _named(form: str, model: str, version: str, fingerprint: str, *outputs: str) -> Headers:
    """The headers that are the same for many answers."""
    return [
        (b"content-type", form.encode()),
        (b"x-model", model.encode()),
        (b"x-model-version", version.encode()),
        (b"x-fingerprint", fingerprint.encode()),
        *([(b"x-outputs", ",".join(outputs).encode())] if outputs else []),
    ]
