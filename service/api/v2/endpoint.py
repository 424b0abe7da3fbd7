"""`POST /v2/models/{model}/infer` as ASGI: an inference request to an `Invocation`, and its answer to a response."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from starlette.types import Receive, Scope

from service.api.face import Face
from service.api.invoke import (
    LOOP_BINARY_BYTES,
    LOOP_BYTES,
    Caller,
    Context,
    Invocation,
    admitted,
    invoke,
    prepare,
    written_by,
)
from service.api.memory import Share
from service.api.reply import Reply, whole_reply
from service.api.request import (
    IDENTITY,
    accepted_codings,
    body_limits,
    coding_of,
    deadline_of,
    deflated,
    disconnected,
    fields,
    inflated,
    read_body,
)
from service.api.v2.models import parted
from service.api.validation import intake_of, options_of
from service.codecs import open_inference
from service.codecs.open_inference import Head, Request
from service.codecs.payload import Answer, Body, Meter, Payload
from service.errors import InvalidOption, InvalidShape, Unreadable, quoted
from service.observability.request_ids import request_id
from service.operations.operation import Operation
from service.runtime.model import Model

INFER_PATHS = ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer")
HEAD = "inference-header-content-length"
"""Header with the length of the JSON object in a body that has binary tensors too."""
LONGEST_HEAD = 12
"""Most digits of it."""
SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")
LEAST_COMPRESSED = 1024
"""Bytes below which an answer is not compressed: it fits into one packet all the same."""


class Received(NamedTuple):
    """A request, received and not yet decoded.

    Attributes:
        model: The model that the path names.
        operation: The operation that the path names.
        body: The body, as it was sent.
        coding: Its content coding.
        head: Length of its JSON object, after decompression; None where that is all.
        fingerprint: The header X-Fingerprint.
        begun: Time of the monotonic clock at which it had arrived.
        caller: Who waits.
    """

    model: Model
    operation: Operation
    body: Body
    coding: bytes
    head: int | None
    fingerprint: bytes | None
    begun: float
    caller: Caller


class InferApp(Face):
    """Serves every operation of every model below `/v2/models`.

    Args:
        operations: The operations by name.
        context: The parts that all faces share.
    """

    def __init__(self, operations: Mapping[str, Operation], context: Context) -> None:
        super().__init__(context)
        self.operations = operations
        self._limit, self._json_limit = body_limits(context.settings)

    async def reply(self, scope: Scope, receive: Receive, share: Share, served: dict[str, Any]) -> Reply | None:
        """As in `Face`."""
        path, context = scope["path_params"], self.context
        name, operation = parted(path["model"], self.operations, context.repository.conditions)
        model = self.find(operation, name, path.get("version"), served)
        headers = fields(scope["headers"])
        coding, head = coding_of(headers), _head_of(headers)
        limit = self._json_limit if head is None else self._limit
        body = await read_body(receive, headers, limit, share)
        if body is None:
            return None
        deadline = deadline_of(headers, context.settings.timeout_s)
        caller = Caller(deadline, partial(disconnected, receive), share)
        fingerprint, begun = headers.get(b"x-fingerprint"), time.monotonic()
        received = Received(model, operation, body, coding, head, fingerprint, begun, caller)
        read = partial(self._invocation, received)
        binary = head is not None and head <= LOOP_BYTES and model.manifest.size is None
        small = coding == IDENTITY and len(body) <= (LOOP_BINARY_BYTES if binary else LOOP_BYTES)
        invocation, asked = await prepare(context, read, caller, "an inference request", in_loop=small)
        answer = await invoke(context.submit, invocation)
        codings = accepted_codings(headers.get(b"accept-encoding", b"").decode("latin-1"))
        work = partial(_written, answer, path["model"], asked, codings[0] if codings else "")
        content, size, coded = await written_by(context, work, answer, invocation.caller)
        media_type = "application/json" if size is None else "application/octet-stream"
        further = [] if size is None else [(HEAD.encode(), b"%d" % size)]
        further += [(b"content-encoding", coded.encode())] if coded else []
        return whole_reply(media_type, answer, content, len(invocation.inputs.rows), further)

    def _invocation(self, received: Received, meter: Meter) -> tuple[Invocation, Head]:
        """Decompress, decode and check a request. Runs in the event loop or in a thread.

        Raises:
            ServiceError: The codec or a check refuses it.
        """
        model, operation, body, coding, head, fingerprint, begun, caller = received
        settings = self.context.settings
        if coding != IDENTITY:
            body = inflated(body, coding, self._json_limit if head is None else self._limit, meter)
        if head is not None and head > self._json_limit.size:
            raise self._json_limit.exceeded()
        intake = intake_of(operation, model, operation.defaults, meter, settings.tile_pixels)
        request = open_inference.read(body, head, intake)
        parameters = dict(request.head.parameters)
        parameters.pop("priority", None)  # requests are served in their order
        if any(parameters.pop(name, None) for name in SEQUENCE):
            raise InvalidOption("requests are independent of each other; leave sequence_id out")
        if timeout_s := _timeout_s(parameters.pop("timeout", 0)):
            caller = caller._replace(deadline=min(caller.deadline, begun + timeout_s))
            caller.check_time()
        options = options_of(operation, parameters, settings.max_draws) if parameters else operation.defaults
        payload = _payload(operation, request, options)
        known = {tensor.name for tensor in operation.outputs if tensor.shape}
        if unknown := request.head.outputs.keys() - known:
            raise InvalidOption(f"no output {quoted(min(unknown))}; {operation.name} has {', '.join(sorted(known))}")
        return admitted(self.context, operation, model, payload, options, caller, intake, fingerprint), request.head


def _payload(operation: Operation, request: Request, options: Any) -> Payload:
    """The inputs of a request as an operation takes them.

    Raises:
        InvalidShape: It has none of that name, or does not take both.
    """
    arrays = dict(request.arrays)
    array, mask = arrays.pop(operation.takes or "", None), arrays.pop("mask", None) if operation.observed else None
    latents = operation.or_latents and array is None and "latents" in arrays
    if latents:
        array = arrays.pop("latents")
    if arrays:
        if operation.or_latents and "latents" in arrays:
            raise InvalidShape(f"{operation.name} takes {operation.takes} or latents; leave one of them out")
        takes = ", ".join(tensor.name for tensor in operation.inputs) or "no inputs"
        raise InvalidShape(f"no input {quoted(min(arrays))}; {operation.name} takes {takes}")
    return Payload(array, mask, options, latents)


def _written(answer: Answer, name: str, asked: Head, coding: str) -> tuple[Body, int | None, str]:
    """(body, length of its JSON object before compression or None, content coding or nothing)."""
    identity = request_id() if asked.identity is None else asked.identity
    content, size = open_inference.write(answer, name, identity, asked)
    if not coding or len(content) < LEAST_COMPRESSED:
        return content, size, ""
    return deflated(content, coding), size, coding


def _head_of(headers: Mapping[bytes, bytes]) -> int | None:
    """The header Inference-Header-Content-Length.

    Raises:
        Unreadable: It is not a whole number.
    """
    value = headers.get(HEAD.encode())
    if value is None:
        return None
    if not value.isdigit() or len(value) > LONGEST_HEAD:
        raise Unreadable("Inference-Header-Content-Length must be the number of bytes of the JSON object")
    return int(value)


def _timeout_s(value: Any) -> float:
    """The parameter `timeout`, in microseconds, as seconds; 0 is none.

    Raises:
        InvalidOption: It is not a whole number.
    """
    if type(value) is not int or value < 0:
        raise InvalidOption("timeout must be a whole number of microseconds, 0 for none")
    return value / 1e6
