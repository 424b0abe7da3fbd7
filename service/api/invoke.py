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
from typing import Any, NamedTuple, TypeVar

from service.api.memory import Memory, Share, answer_bytes
from service.api.offload import Offload
from service.api.progress import Event, watched
from service.api.validation import admit, check_fingerprint, terms_of, variant_of
from service.codecs.payload import Answer, Intake, Meter, Payload, scaled
from service.codecs.source import Source
from service.errors import CallerGone, DeadlinePassed, Deferred, ReaderFault, ServiceError
from service.observability.metrics import Telemetry
from service.observability.request_ids import request_id
from service.operations.inference.latent import BLOCK_ROWS
from service.operations.inference.vae import Result
from service.operations.operation import Inputs, Operation
from service.repository.repository import Repository
from service.runtime.model import Model
from service.runtime.program import Submit
from service.runtime.tiling import Levels
from service.settings import Settings

log = logging.getLogger(__name__)

PART_ROWS = 4 * BLOCK_ROWS
"""Rows of a part. A larger answer of which a format can send parts is sent so, which bounds its memory."""

LOOP_BYTES = 2**16
"""Largest body that the event loop decodes; a larger one is decoded in a thread."""
LOOP_BINARY_BYTES = 2**20
"""The same for binary arrays, which are not parsed."""
LOOP_NUMBERS = 2**16
"""Most numbers of an answer that the event loop writes; a larger one is written in a thread."""
LOOP_BINARY_NUMBERS = 2**18
"""The same for binary arrays, of which the numbers are copied once at most."""

Further = TypeVar("Further")
LevelsOf = Callable[[Model, Source | None, tuple[int, int]], Levels | None]
"""(model, what is kept of pictures, height and width) -> the type of levels that images of the answer may be."""


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
        source: What pictures in the answer keep of those that were sent; None without any.
    """

    model: Model
    operation: Operation
    inputs: Inputs
    options: Any
    caller: Caller
    begun: bool = False
    row_bytes: int = 0
    source: Source | None = None


async def invoke(submit: Submit, invocation: Invocation) -> Answer:
    """Run an operation and give its whole answer.

    Raises:
        ServiceError: What the operation and the engine raise.
    """
    model, operation, inputs, options, caller, begun, _, source = invocation
    known = partial(submit, deadline=None if begun else caller.deadline, gone=caller.gone, begun=begun)
    if inputs.levels is not None:
        known = partial(known, levels=inputs.levels)
    return _answer(model, await operation.perform(model, known, inputs, options), source)


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


def _answer(model: Model, result: Result, source: Source | None = None) -> Answer:
    """The result of an operation, with the model that it is from."""
    manifest, trip = model.manifest, result.trip
    about = {
        "model": manifest.name,
        "version": manifest.version,
        "fingerprint": manifest.fingerprint,
        **result.about,
    }
    return Answer(result.outputs, about, trip.queue_s, trip.inference_s, source or Source())


def admitted(
    context: Context,
    operation: Operation,
    model: Model,
    payload: Payload,
    options: Any,
    caller: Caller,
    intake: Intake,
    fingerprint: bytes | None = None,
    *,
    in_parts: bool = False,
    levels_of: LevelsOf | None = None,
) -> Invocation:
    """Check what a codec has read, adapt it to the model, and take the memory of the answer.

    Args:
        context: The application.
        operation: The operation.
        model: The first variant of the model; the payload and the options choose the variant.
        payload: The arrays, as they were sent.
        options: Of the operation's own class.
        caller: Who waits.
        intake: What the codec was told.
        fingerprint: That of the model that the request is for; None for any.
        in_parts: Whether an answer of many rows is sent in parts, of which two are in memory at a time.
        levels_of: Chooses the type of levels of images that are written as pictures; None for floats.

    Raises:
        ServiceError: A check refuses the request.
    """
    if payload.source is not None or options.scaling is not None:
        payload = scaled(payload, options.scaling, intake.meter)
    terms = terms_of(operation, model, options)
    if model.others or not terms.offered:
        model = variant_of(operation, model, payload, options)
        terms = terms_of(operation, model, options)
        operation.check_offered(model, context.repository.models, options)
        terms.offered = True
    check_fingerprint(model, fingerprint, options)
    share, source = caller.share, payload.source
    if intake.float_pixels is not None and payload.array is not None and intake.keeps_levels(payload.array):
        kept = 2 * (payload.array.nbytes + (0 if payload.mask is None else payload.mask.nbytes))  # padded too
        share.keep(kept + (source.nbytes if source else 0))
    row_bytes, levels = terms.row_bytes or 0, None

    def room(rows: int, size: tuple[int, int] | None) -> None:
        nonlocal row_bytes, levels
        if size is not None:
            levels = None if levels_of is None else levels_of(model, source, size)
            row_bytes = answer_bytes(model, options, 1, size, levels=levels)
        share.need((min(rows, 2 * PART_ROWS) if in_parts else rows) * row_bytes)

    most = context.settings.max_request_rows
    inputs = admit(operation, model, payload, options, most, room, intake.float_pixels)
    if levels is not None:
        inputs = inputs._replace(levels=levels)
    if operation.check is not None:
        operation.check(model, inputs, options)
    if source is not None and options.resizing in ("pad", "crop"):
        source = source._replace(how=options.resizing)
    return Invocation(model, operation, inputs, options, caller, row_bytes=row_bytes, source=source)


async def prepare(
    context: Context,
    read: Callable[[Meter], tuple[Invocation, Further]],
    caller: Caller,
    what: str,
    *,
    in_loop: bool,
) -> tuple[Invocation, Further]:
    """Read a request into an invocation: in the event loop where that is quick, else in a thread.

    Args:
        context: The application.
        read: Reads and checks the body, within the limits of the meter that it is given; gives the invocation, and
            what else its face needs of the body.
        caller: Whose deadline and memory bound the reading.
        what: Name of the format, for messages.
        in_loop: Whether to try the event loop first. `read` raises Deferred where that would take too long.

    Returns:
        What `read` gives.

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
        found = await context.offload.run(partial(read, Meter(*limits)), share, caller.deadline, caller.gone)
    except (ServiceError, MemoryError):
        raise
    except Exception as error:
        log.exception("request %s: reading %s failed", request_id(), what)
        raise ReaderFault(f"the body cannot be read as {what}") from error
    invocation, _ = found
    share.keep(invocation.inputs.nbytes + (invocation.source.nbytes if invocation.source else 0))
    return found


async def written_by(
    context: Context, work: Callable[[], Further], answer: Answer, caller: Caller, most: int = LOOP_NUMBERS
) -> Further:
    """Write an answer: in the event loop where that is quick, else in a thread.

    Args:
        context: The application.
        work: Writes it.
        answer: The answer.
        caller: Whose deadline and memory bound the writing.
        most: Most numbers of an answer that the event loop writes.

    Returns:
        What `work` gives.

    Raises:
        ServiceError: What `work` raises.
    """
    if sum([array.size for array in answer.outputs.values()]) <= most:
        return work()
    return await context.offload.run(work, caller.share, caller.deadline, caller.gone)
