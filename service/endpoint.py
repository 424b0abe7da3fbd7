"""The route class that serves an operation: FastAPI documents it, a lean ASGI function answers it.

The call does not go through FastAPI's dependency solver, which costs more than the inference.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, NamedTuple
from urllib.parse import parse_qsl

from fastapi import Path as PathParameter
from fastapi import Query, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from service import problems
from service.admission import admit
from service.batcher import Batcher
from service.codecs import READERS, Answer, Intake, Payload
from service.config import Settings
from service.errors import InvalidOption, TooLarge, UnsupportedMediaType
from service.negotiation import form_of, write
from service.operation import Operation
from service.repository import Model, Repository
from service.telemetry import Telemetry, server_timing
from service.vae import Result, Submit

HEADER_NUMBERS = 16
"""Lists longer than this are not repeated in a header."""

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Context:
    """What every operation shares: one an application."""

    settings: Settings
    repository: Repository
    batcher: Batcher
    telemetry: Telemetry


class Reply(NamedTuple):
    """What goes back, and how it is counted."""

    status: int
    headers: Headers
    content: bytes
    outcome: str
    rows: int


class OperationRoute(APIRoute):
    """Documents the endpoint as FastAPI does, serves it as the endpoint's `operation_app` does."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.app = endpoint.operation_app  # type: ignore[attr-defined]


def endpoint(operation: Operation, context: Context, path_names: tuple[str, ...]) -> Callable[..., Any]:
    """A function with the signature that FastAPI documents, carrying the application that serves it."""

    async def documented(**_: Any) -> Response:
        raise AssertionError("served by OperationApp")

    keyword = inspect.Parameter.KEYWORD_ONLY
    help_texts = {"model": "Name of a model, see /v1/models", "version": "One of its versions"}
    parameters = [
        inspect.Parameter(name, keyword, annotation=Annotated[str, PathParameter(description=help_texts[name])])
        for name in path_names
    ]
    parameters.append(inspect.Parameter("options", keyword, annotation=Annotated[operation.options, Query()]))
    documented.__signature__ = inspect.Signature(parameters, return_annotation=Response)  # type: ignore[attr-defined]
    documented.operation_app = OperationApp(operation, context)  # type: ignore[attr-defined]
    return documented


class OperationApp:
    """Serves one operation: body to payload to rows to batch to answer to body."""

    def __init__(self, operation: Operation, context: Context) -> None:
        self.operation = operation
        self.context = context
        self.options_of_query = lru_cache(1024)(lambda query: self._options(_pairs(query)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; every error is answered as a problem."""
        path, label = scope["path_params"], "unknown"
        try:
            model = self.context.repository.find(path.get("model"), path.get("version"))
            label = model.manifest.name
            self.operation.check_offered(model)
            headers = dict(scope["headers"])
            body = await read_body(receive, headers, self.context.settings.max_body_bytes)
            if body is None:
                return
            reply = await self._answer(model, scope["query_string"], headers, body, self._submit(headers, receive))
        except Exception as error:  # noqa: BLE001  # the one place where errors become answers
            reply = _refusal(error)
        self.context.telemetry.request(label, self.operation.name, reply.outcome, reply.rows)
        head = [*reply.headers, (b"content-length", b"%d" % len(reply.content))]
        await send({"type": "http.response.start", "status": reply.status, "headers": head})
        await send({"type": "http.response.body", "body": reply.content})

    async def _answer(
        self, model: Model, query: bytes, headers: dict[bytes, bytes], body: bytes, submit: Submit
    ) -> Reply:
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        accept = headers.get(b"accept", b"*/*").decode("latin-1")
        settings, operation = self.context.settings, self.operation
        form = form_of(content_type, body, operation)
        intake = Intake(operation.takes or "", operation.row_shape(model), settings.max_pixels)
        payload = READERS[form](body, content_type, intake) if form else Payload(None)
        options = (
            self._options({**_pairs(query), **payload.options}) if payload.options else self.options_of_query(query)
        )
        inputs = admit(operation, model, payload, options, settings.max_request_rows)
        result = await operation.run(model, submit, inputs, options)
        about = {"model": model.manifest.name, "version": model.manifest.version, **result.about}
        answer_form, content = write(Answer(result.outputs, about), accept, form)
        rows = len(next(iter(result.outputs.values())))
        return Reply(200, _headers(answer_form, about, result), content, "ok", rows)

    def _options(self, named: Mapping[str, Any]) -> Any:
        try:
            options = self.operation.options.model_validate(named)
        except ValidationError as error:
            known = ", ".join(self.operation.options.model_fields) or "none"
            problem = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
            raise InvalidOption(f"{problem} (options of {self.operation.name}: {known})") from error
        limit = self.context.settings.max_draws
        if options.multiplicity > limit:
            raise InvalidOption(f"draws is {options.multiplicity}, VAE_MAX_DRAWS is {limit}")
        return options

    def _submit(self, headers: dict[bytes, bytes], receive: Receive) -> Submit:
        """The batcher's submit, with this request's deadline and a way to ask whether its caller is still there."""
        seconds = self.context.settings.timeout_s
        wished = headers.get(b"x-timeout-ms")
        if wished is not None:
            if not wished.isdigit() or int(wished) == 0:
                raise InvalidOption("X-Timeout-Ms must be a whole number of milliseconds above 0")
            seconds = min(seconds, int(wished) / 1000.0)
        gone = partial(disconnected, receive)
        return partial(self.context.batcher.submit, deadline=time.monotonic() + seconds, gone=gone)


async def read_body(receive: Receive, headers: dict[bytes, bytes], limit: int) -> bytes | None:
    """The whole body; None where the caller has gone.

    Raises: TooLarge before the rest is read, UnsupportedMediaType for a compressed body.
    """
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise UnsupportedMediaType("compressed bodies are not read; send it without Content-Encoding")
    if int(headers.get(b"content-length", b"0")) > limit:
        raise _body_too_large(limit)
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _body_too_large(limit)
        chunks.append(chunk)
        more = message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def disconnected(receive: Receive) -> bool:
    """Whether the caller has hung up: one step of ASGI's receive, which says so at once or would wait."""
    step: Any = receive()
    try:
        step.send(None)
    except StopIteration as done:
        return bool(done.value["type"] == "http.disconnect")
    step.close()
    return False


def _body_too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is above VAE_MAX_BODY_BYTES ({limit}); send fewer rows, or raise it")


def _pairs(query: bytes) -> dict[str, str]:
    return dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))


def _refusal(error: Exception) -> Reply:
    status, code, content, extra = problems.describe(error)
    head = [(b"content-type", problems.MEDIA_TYPE.encode())]
    head += [(name.encode(), value.encode()) for name, value in extra.items()]
    return Reply(status, head, content, code, 0)


def _headers(form: str, about: dict[str, Any], result: Result) -> Headers:
    head: Headers = [
        (b"content-type", form.encode()),
        (b"server-timing", server_timing(result.trip.queue_s, result.trip.inference_s).encode()),
        (b"x-model", about["model"].encode()),
        (b"x-model-version", about["version"].encode()),
        (b"x-outputs", ",".join(result.outputs).encode()),
    ]
    if "seed" in about:
        head.append((b"x-seed", str(about["seed"]).encode()))
    if "level" in about and len(about["level"]) <= HEADER_NUMBERS:
        head.append((b"x-level", ",".join(f"{value:.4g}" for value in about["level"]).encode()))
    return head
