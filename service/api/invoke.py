"""Runs operations without a transport: an `Invocation` gives an answer, answers part by part, or a stream of events.

A face, such as HTTP's `/v1`, reads a request into an `Invocation`, calls one of `invoke`, `invoke_parts` and
`invoke_events`, and writes what they give. Nothing here knows headers, media types or status codes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from service.api.memory import Memory, Share
from service.api.offload import Offload
from service.api.progress import Event, watched
from service.codecs.payload import Answer, Meter
from service.errors import CallerGone, DeadlinePassed, Deferred, ReaderFault, ServiceError
from service.observability.metrics import Telemetry
from service.observability.request_ids import request_id
from service.operations.inference.vae import Result
from service.operations.operation import Inputs, Operation
from service.repository.repository import Repository
from service.runtime.model import Model
from service.runtime.program import Submit
from service.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """The parts that all faces of one application share."""

    settings: Settings
    repository: Repository
    submit: Submit
    telemetry: Telemetry
    memory: Memory
    offload: Offload


class Caller(NamedTuple):
    """The side that waits for an answer.

    Attributes:
        deadline: By time.monotonic(); work that has not begun by then is refused.
        gone: Whether the caller has hung up.
        share: Its memory.
    """

    deadline: float
    gone: Callable[[], bool]
    share: Share

    def check_time(self) -> None:
        """Raise DeadlinePassed after the deadline."""
        if time.monotonic() > self.deadline:
            raise DeadlinePassed


class Invocation(NamedTuple):
    """One operation to be run, with inputs and options that have been checked against the model.

    Attributes:
        model: The version that runs it.
        operation: What to run.
        inputs: Rows of the model's shape.
        options: Of the operation's own class.
        caller: Who waits.
        begun: Whether it is a further part of an answer that has begun: neither a full queue nor the deadline refuses
            it.
        row_bytes: Estimated memory of answering one row.
    """

    model: Model
    operation: Operation
    inputs: Inputs
    options: Any
    caller: Caller
    begun: bool = False
    row_bytes: int = 0


async def invoke(submit: Submit, invocation: Invocation) -> Answer:
    """Run an operation and give its whole answer.

    Raises:
        ServiceError: What the operation and the engine raise.
    """
    model, operation, inputs, options, caller, begun, _ = invocation
    known = partial(submit, deadline=None if begun else caller.deadline, gone=caller.gone, begun=begun)
    if inputs.levels is not None:
        known = partial(known, levels=inputs.levels)
    return _answer(model, await operation.perform(model, known, inputs, options))


async def invoke_parts(submit: Submit, invocation: Invocation, rows: int) -> AsyncGenerator[Answer, None]:
    """Run an operation `rows` rows at a time; each part is computed while the one before is sent.

    The parts together are the answer that `invoke` gives: rows are independent, and noise is a function of the seed
    and of a row's place.

    Raises:
        ServiceError: What the operation and the engine raise.
        CallerGone: The caller hung up between two parts.
    """
    inputs, options, caller = invocation.inputs, invocation.options, invocation.caller
    answer = await invoke(submit, invocation._replace(inputs=inputs.part(0, rows)))
    if "seed" in answer.about:
        options = options.model_copy(update={"seed": answer.about["seed"]})
    for start in range(rows, len(inputs.rows), rows):
        further = invocation._replace(inputs=inputs.part(start, rows), options=options, begun=True)
        ahead = asyncio.ensure_future(invoke(submit, further))
        try:
            yield answer
            if caller.gone():
                raise CallerGone("the caller hung up")
            answer = await ahead
        finally:
            ahead.cancel()
    yield answer


def invoke_events(submit: Submit, invocation: Invocation) -> AsyncGenerator[Event | None, None]:
    """Run an operation and report its progress, then its answer; see `watched`."""
    model, inputs = invocation.model, invocation.inputs

    async def run(observe: Callable[[Answer], None]) -> Answer:
        observed = inputs._replace(observe=lambda result: observe(_answer(model, result)))
        return await invoke(submit, invocation._replace(inputs=observed))

    return watched(run)


def _answer(model: Model, result: Result) -> Answer:
    """The result of an operation, with the model that it is from."""
    manifest, trip = model.manifest, result.trip
    about = {
        "model": manifest.name,
        "version": manifest.version,
        "fingerprint": manifest.fingerprint,
        **result.about,
    }
    return Answer(result.outputs, about, trip.queue_s, trip.inference_s)


async def prepare(
    context: Context, read: Callable[[Meter], Invocation], caller: Caller, what: str, *, in_loop: bool
) -> Invocation:
    """Read a request into an invocation: in the event loop where that is quick, else in a thread.

    Args:
        context: The application.
        read: Reads and checks the body, within the limits of the meter that it is given.
        caller: Whose deadline and memory bound the reading.
        what: Name of the format, for messages.
        in_loop: Whether to try the event loop first. `read` raises Deferred where that would take too long.

    Raises:
        ReaderFault: `read` raised an error that is no ServiceError: a bug, logged with its traceback.
        ServiceError: What `read` raises.
    """
    settings, share = context.settings, caller.share
    limits = settings.max_pixels, settings.max_request_rows, share.reserve, caller.check_time
    try:
        if in_loop:
            try:
                return read(Meter(*limits, in_loop=True))
            except Deferred:
                pass  # it is read again, in a thread
        invocation = await context.offload.run(partial(read, Meter(*limits)), share, caller.deadline, caller.gone)
    except (ServiceError, MemoryError):
        raise
    except Exception as error:
        log.exception("request %s: reading %s failed", request_id(), what)
        raise ReaderFault(f"the body cannot be read as {what}") from error
    share.keep(invocation.inputs.nbytes)
    return invocation
