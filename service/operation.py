"""An operation: what a POST takes, its options, what it gives, how it runs; and the route class that serves it.

FastAPI reads a route's signature and documents it; the call itself goes through the lean ASGI function here, not
through FastAPI's dependency solver, which costs more than the inference.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

import numpy as np
from fastapi import Path as PathParameter
from fastapi import Query, Response
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Receive, Scope, Send

from service import problems
from service.batcher import Batcher
from service.codecs import ANSWERS_IN, READERS, WRITERS, Answer, Intake, Payload
from service.codecs.payload import as_images, as_rows
from service.config import Settings
from service.errors import (
    InvalidOption,
    InvalidShape,
    InvalidValue,
    NotAcceptable,
    TooLarge,
    Unreadable,
    UnsupportedMediaType,
    UnsupportedOperation,
)
from service.latent import MAX_SEED
from service.pixels import Fit, fit
from service.repository import Model, Repository
from service.telemetry import Telemetry, server_timing
from service.vae import Result, Submit

OBSERVED_MARGIN = 10.0
"""How many widths of the value range an observed, noisy value may lie outside it."""
HEADER_NUMBERS = 16
"""Lists longer than this are not repeated in a header."""

Rows = NDArray[np.float32]
Headers = list[tuple[bytes, bytes]]


class Options(BaseModel):
    """Options of one operation: the same names in JSON and in the query string; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @property
    def multiplicity(self) -> int:
        """Rows that one row of the request becomes."""
        return max(1, getattr(self, "draws", 0))


class ImageOptions(Options):
    """Options of everything that takes images."""

    fit: Fit | None = None
    """Bring images of another size to the model's: `resize` stretches, `pad` adds black, `crop` cuts."""


class DrawOptions(ImageOptions):
    """Options of everything that may draw from a posterior."""

    draws: Annotated[int, Field(ge=0)] = 0
    """Posterior draws an image; 0 uses the posterior's mean."""
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    """Seed of the draws; the answer names the one it used."""


class Inputs(BaseModel):
    """What an operation runs on: the rows, and the mask beside them where there is one."""

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)

    rows: Any
    mask: Any = None


Run = Callable[[Model, Submit, Any, Any], Awaitable[Result]]
"""(model, submit, inputs, options) -> Result."""


@dataclass(frozen=True)
class Operation:
    """A declaration; everything about an endpoint that is not shared with the others."""

    name: str
    summary: str
    description: str
    options: type[Options]
    run: Run
    takes: Literal["images", "latents"] | None
    example: dict[str, Any]
    answer: dict[str, Any]
    bounded: bool = True
    """Whether what it takes must lie in the model's value range; an observation with noise need not."""
    needs: tuple[str, ...] = ()
    """Graphs that a model must have been exported with."""

    def offered_by(self, model: Model) -> bool:
        """Whether the model can do it."""
        return all(graph in model.graphs for graph in self.needs)


@dataclass(frozen=True)
class Context:
    """What every operation shares: one an application."""

    settings: Settings
    repository: Repository
    batcher: Batcher
    telemetry: Telemetry


class OperationRoute(APIRoute):
    """Documents the endpoint as FastAPI does, serves it as the endpoint's `operation_app` does."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.app = endpoint.operation_app  # type: ignore[attr-defined]


class OperationApp:
    """Serves one operation: body to rows to batch to body."""

    def __init__(self, operation: Operation, context: Context) -> None:
        self.operation = operation
        self.context = context
        self.parse_query = lru_cache(1024)(self._parse_query)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; every error is answered as a problem."""
        path, label = scope["path_params"], "unknown"
        try:
            model = self.context.repository.find(path.get("model"), path.get("version"))
            label = model.manifest.name
            self._check_offered(model)
            headers = dict(scope["headers"])
            body = await read_body(receive, headers, self.context.settings.max_body_bytes)
            if body is None:
                return
            submit = self._submit(headers, receive)
            status, content, answered = await self._answer(model, scope["query_string"], headers, body, submit)
            outcome, rows = "ok", answered.rows
            head = answered.headers
        except Exception as error:  # noqa: BLE001  # the one place where errors become answers
            status, outcome, content, extra = problems.describe(error)
            head = [(b"content-type", problems.MEDIA_TYPE.encode())]
            head += [(name.encode(), value.encode()) for name, value in extra.items()]
            rows = 0
        self.context.telemetry.request(label, self.operation.name, outcome, rows)
        head.append((b"content-length", b"%d" % len(content)))
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": content})

    async def _answer(
        self, model: Model, query: bytes, headers: dict[bytes, bytes], body: bytes, submit: Submit
    ) -> tuple[int, bytes, Answered]:
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        form = media_type(content_type, body, self.operation)
        payload = self._read(form, content_type, body, model)
        options = self._options(query, payload.options)
        inputs = self._inputs(model, payload, options)
        result = await self.operation.run(model, submit, inputs, options)
        rows = len(next(iter(result.outputs.values())))
        about = {"model": model.manifest.name, "version": model.manifest.version, **result.about}
        accept = headers.get(b"accept", b"*/*").decode("latin-1")
        answer_form, content = self._write(Answer(result.outputs, about), accept, form)
        return 200, content, Answered(rows, self._headers(answer_form, about, result))

    def _read(self, form: str | None, content_type: str, body: bytes, model: Model) -> Payload:
        takes = self.operation.takes
        intake = Intake(takes or "", self._row_shape(model), self.context.settings.max_pixels)
        if form is None:
            return Payload(None)
        payload = READERS[form](body, content_type, intake)
        if takes and payload.array is None:
            raise InvalidShape(f'the body lacks "{takes}"')
        return payload

    def _options(self, query: bytes, named: Mapping[str, Any]) -> Any:
        return self._validate({**_pairs(query), **named}) if named else self.parse_query(query)

    def _parse_query(self, query: bytes) -> Any:
        return self._validate(_pairs(query))

    def _validate(self, named: dict[str, Any]) -> Any:
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

    def _inputs(self, model: Model, payload: Payload, options: Any) -> Inputs:
        """The rows checked: shape, then count, then range."""
        if payload.array is None:
            self._check_rows(options.count)
            return Inputs.model_construct(rows=None)
        takes = str(self.operation.takes)
        rows = self._shaped(payload.array, self._row_shape(model), takes, options)
        self._check_rows(len(rows) * options.multiplicity)
        if self.operation.takes == "images":
            low, high = model.manifest.value_range
            margin = 0.0 if self.operation.bounded else OBSERVED_MARGIN * (high - low)
            check_range(rows, low - margin, high + margin, "images")
        else:
            check_range(rows, -np.inf, np.inf, "latents")
        return Inputs.model_construct(rows=rows, mask=self._mask(payload, model, options, len(rows)))

    def _shaped(self, array: NDArray[Any], shape: tuple[int, ...], name: str, options: Any) -> Rows:
        """Rows of the model's shape, brought there where the caller says how."""
        how = getattr(options, "fit", None)
        if how is None:
            return as_rows(array, shape, name)
        images = as_images(array, shape[0], name)
        self._check_rows(len(images))
        return images if images.shape[1:] == shape else fit(images, (shape[1], shape[2]), how)

    def _mask(self, payload: Payload, model: Model, options: Any, rows: int) -> Rows | None:
        """1 where seen, for every channel; one mask for all rows, or one a row."""
        if payload.mask is None:
            return None
        if self.operation.bounded:
            raise InvalidOption(f"{self.operation.name} takes no mask")
        mask = self._shaped(payload.mask, (1, *model.input_shape[1:]), "mask", options)
        check_range(mask, 0.0, 1.0, "mask")
        if len(mask) not in (1, rows):
            raise InvalidShape(f"{len(mask)} masks for {rows} images; send one, or one an image")
        seen = (mask >= 0.5).astype(np.float32)
        return np.broadcast_to(seen, (rows, *model.input_shape))

    def _row_shape(self, model: Model) -> tuple[int, ...]:
        return model.latent_shape if self.operation.takes == "latents" else model.input_shape

    def _check_rows(self, rows: int) -> None:
        limit = self.context.settings.max_request_rows
        if rows > limit:
            raise TooLarge(f"{rows} rows in one request, draws counted; VAE_MAX_REQUEST_ROWS is {limit}")

    def _submit(self, headers: dict[bytes, bytes], receive: Receive) -> Submit:
        seconds = self.context.settings.timeout_s
        wished = headers.get(b"x-timeout-ms")
        if wished is not None:
            if not wished.isdigit() or int(wished) == 0:
                raise InvalidOption("X-Timeout-Ms must be a whole number of milliseconds above 0")
            seconds = min(seconds, int(wished) / 1000.0)
        gone = partial(disconnected, receive)
        return partial(self.context.batcher.submit, deadline=time.monotonic() + seconds, gone=gone)

    def _write(self, answer: Answer, accept: str, form: str | None) -> tuple[str, bytes]:
        """The first acceptable form that can hold the answer."""
        wishes = preferences(accept)
        like_request = ANSWERS_IN.get(form or "", form or "application/json")
        for wish in wishes:
            for candidate in (like_request, *WRITERS) if "*" in wish else (wish,):
                if candidate in WRITERS and _matches(wish, candidate):
                    content = WRITERS[candidate](answer)
                    if content is not None:
                        return candidate, content
        raise NotAcceptable(
            f"the outputs {', '.join(answer.outputs)} cannot be sent as {accept[:100]}; "
            f"accept one of {', '.join(WRITERS)} (PNG holds images alone, npy and raw arrays of one shape)"
        )

    def _headers(self, form: str, about: dict[str, Any], result: Result) -> Headers:
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

    def _check_offered(self, model: Model) -> None:
        if not self.operation.offered_by(model):
            lacking = ", ".join(graph for graph in self.operation.needs if graph not in model.graphs)
            name = model.manifest.name
            raise UnsupportedOperation(f"model {name} was exported without {lacking}; {self.operation.name} needs it")


@dataclass(frozen=True)
class Answered:
    """How many rows an answer holds, and its headers."""

    rows: int
    headers: Headers


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


def media_type(content_type: str, body: bytes, operation: Operation) -> str | None:
    """The request's media type; None where there is no body and none is needed.

    Raises: UnsupportedMediaType, Unreadable.
    """
    form = content_type.split(";", 1)[0].strip().lower()
    if not operation.takes:
        if body and form != "application/json":
            raise UnsupportedMediaType(f"{operation.name} takes its options in the query string or as application/json")
        return form if body else None
    if not body:
        raise Unreadable(f"the body is empty; {operation.name} takes {operation.takes}")
    if form not in READERS:
        said = f"Content-Type {form!r:.80} is not read" if form else "Content-Type is missing"
        raise UnsupportedMediaType(f"{said}; send one of {', '.join(READERS)}")
    return form


@lru_cache(1024)
def preferences(accept: str) -> tuple[str, ...]:
    """Media types of an Accept header, best first; those with q=0 are left out."""
    ranked: list[tuple[float, int, str]] = []
    for index, entry in enumerate(accept.split(",")):
        form, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                quality = _quality(parameter[2:])
        if quality > 0.0 and form:
            ranked.append((-quality, index, form))
    return tuple(form for _, _, form in sorted(ranked)) or ("*/*",)


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _matches(wish: str, candidate: str) -> bool:
    return wish in ("*/*", candidate) or (wish.endswith("/*") and candidate.startswith(wish[:-1]))


def _pairs(query: bytes) -> dict[str, str]:
    return dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))


def check_range(array: Rows, low: float, high: float, name: str) -> None:
    """Refuse NaN, infinity and what lies outside [low, high]; min and max carry a NaN along.

    Raises: InvalidValue.
    """
    least, most = array.min(), array.max()
    if least >= low and most <= high and np.isfinite(least) and np.isfinite(most):
        return
    if not (np.isfinite(least) and np.isfinite(most)):
        raise InvalidValue(f"{name} holds NaN or infinity; every value must be a finite number")
    advice = "; divide 8-bit values by 255" if most > 1.0 and name == "images" else ""
    raise InvalidValue(f"{name} has values from {least:g} to {most:g}; they must lie in [{low:g}, {high:g}]{advice}")


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
