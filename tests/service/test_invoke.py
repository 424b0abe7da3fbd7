"""Operations run without a transport."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from service.api.invoke import Caller, Context, Invocation, invoke, invoke_events, invoke_parts, prepare
from service.api.memory import Memory, Share
from service.api.offload import Offload
from service.codecs.payload import Answer, Meter
from service.errors import CallerGone, DeadlinePassed, Deferred, TooLarge
from service.observability.metrics import Telemetry
from service.operations.denoise import denoise
from service.operations.encode import encode
from service.operations.operation import Inputs, Operation
from service.operations.sample import sample
from service.repository.repository import Repository
from service.runtime.model import Model
from service.runtime.program import Submit
from service.runtime.scheduler import Engine
from service.settings import Settings

Rows = NDArray[np.float32]
T = TypeVar("T")


def caller(gone: Callable[[], bool] = lambda: False, deadline: float = math.inf) -> Caller:
    return Caller(deadline, gone, Share(Memory(2**20)))


def invocation(model: Model, operation: Operation, rows: Rows, who: Caller, **options: Any) -> Invocation:
    return Invocation(model, operation, Inputs(rows), operation.options(**options), who)


def run(work: Callable[[Submit], Awaitable[T]]) -> T:
    """Run with an engine, which is closed afterwards."""

    async def scenario() -> T:
        engine = Engine(max_rows=8, queue_rows=4096)
        try:
            return await work(engine.submit)
        finally:
            await engine.close()

    return asyncio.run(scenario())


def test_an_answer_has_the_outputs_of_the_graph_and_names_the_model(
    model: Model, graphs: dict[str, Callable[..., tuple[Rows, ...]]], images: Rows
) -> None:
    """`invoke` needs no request."""
    answer = run(lambda submit: invoke(submit, invocation(model, encode, images, caller())))
    mean, log_var = graphs["encoder"](images)
    np.testing.assert_allclose(answer.outputs["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(answer.outputs["log_var"], log_var, rtol=1e-5, atol=1e-6)
    assert answer.about == {"model": "digits", "version": "1", "fingerprint": model.manifest.fingerprint}
    assert answer.inference_s > 0.0


@pytest.mark.parametrize("seed", [7, None])
def test_parts_are_the_whole_answer(model: Model, seed: int | None) -> None:
    """Bit for bit; without a seed, all parts have the one drawn for the first."""
    nothing = np.empty((300, 0), np.float32)

    async def work(submit: Submit) -> tuple[list[Answer], Answer]:
        asked = invocation(model, sample, nothing, caller(), count=300, seed=seed)
        parts = [part async for part in invoke_parts(submit, asked, 128)]
        same = asked.options.model_copy(update={"seed": parts[0].about["seed"]})
        return parts, await invoke(submit, asked._replace(options=same))

    parts, whole = run(work)
    assert [len(part.outputs["images"]) for part in parts] == [128, 128, 44]
    assert {part.about["seed"] for part in parts} == {whole.about["seed"]}
    np.testing.assert_array_equal(np.concatenate([part.outputs["images"] for part in parts]), whole.outputs["images"])


def test_parts_end_when_the_caller_hangs_up_and_not_at_the_deadline(model: Model) -> None:
    """The deadline is for the first part, which a later one has kept."""
    nothing = np.empty((300, 0), np.float32)

    async def hung_up(submit: Submit) -> None:
        gone: list[bool] = []
        asked = invocation(model, sample, nothing, caller(lambda: bool(gone)), count=300)
        parts = invoke_parts(submit, asked, 64)
        await anext(parts)
        await anext(parts)
        gone.append(True)
        with pytest.raises(CallerGone):
            await anext(parts)

    async def late(submit: Submit) -> None:
        asked = invocation(model, sample, nothing, caller(deadline=0.0), count=300)
        with pytest.raises(DeadlinePassed):
            await invoke(submit, asked)
        await invoke(submit, asked._replace(begun=True))

    run(hung_up)
    run(late)


def test_events_are_progress_and_then_the_answer_of_invoke(model: Model, images: Rows) -> None:
    """Of the same kind, all of them: what a codec writes."""

    async def work(submit: Submit) -> tuple[list[tuple[str, Answer]], Answer]:
        asked = invocation(model, denoise, images, caller(), quality="refined", level=0.2, seed=4)
        events = [(event.kind, event.answer) async for event in invoke_events(submit, asked) if event]
        return events, await invoke(submit, asked)

    (*progress, (kind, answer)), plain = run(work)
    assert {kind for kind, _ in progress} == {"progress"}
    assert kind == "answer"
    np.testing.assert_array_equal(answer.outputs["images"], plain.outputs["images"])
    assert all(event.about["model"] == "digits" for _, event in progress)


def test_reading_that_takes_long_is_begun_again_in_a_thread(small_models: Path) -> None:
    """`read` raises Deferred in the event loop; its errors reach the caller from either place."""
    settings = Settings(models=small_models)
    threads: list[int] = []

    def read(meter: Meter) -> Invocation:
        threads.append(threading.get_ident())
        meter.picture(200, 200, 1)
        raise TooLarge("read")

    async def scenario() -> None:
        offload = Offload(1)
        submit, telemetry = Engine(max_rows=8, queue_rows=4096).submit, Telemetry(lambda: (0, 0))
        context = Context(settings, Repository({}, ""), submit, telemetry, Memory(100_000), offload)
        for in_loop in (True, False):
            with pytest.raises(TooLarge, match="read"):
                await prepare(context, read, caller(), "pictures", in_loop=in_loop)
        offload.close()

    asyncio.run(scenario())
    assert [thread == threading.get_ident() for thread in threads] == [True, False, False]
    with pytest.raises(Deferred):
        Meter(in_loop=True).picture(200, 200, 1)
