"""What measured times are for: the sizes of batches, where they run, what is refused, and what callers are told."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from service.api.problems import describe
from service.app import create_app
from service.errors import Overloaded
from service.observability.metrics import server_timing
from service.repository.repository import Repository
from service.repository.version import open_model
from service.runtime.batcher import Batcher
from service.runtime.model import Model
from service.runtime.program import Arrays, ModelProgram, Program, Trip
from service.settings import Settings
from tests.service.conftest import until

MODELS = Path(__file__).parents[2] / "models"


class Computer:
    """Computes nothing on a clock of its own, where that takes as long as it is told.

    seconds: by number of rows. batches: rows of each. gate: what batch `until` and later ones wait for.
    """

    def __init__(self, seconds: Callable[[int], float], until: float = np.inf) -> None:
        self.seconds, self.until, self.now = seconds, until, 0.0
        self.batches: list[int] = []
        self.threads: list[int] = []
        self.gate = threading.Event()

    def clock(self) -> float:
        """Its time."""
        return self.now

    def compute(self, x: NDArray[Any]) -> Arrays:
        """The rows."""
        self.batches.append(len(x))
        self.threads.append(threading.get_ident())
        if len(self.batches) >= self.until:
            assert self.gate.wait(20)
        self.now += self.seconds(len(x))
        return (x,)

    def measured(self, max_rows: int = 64) -> ModelProgram:
        """A program that has been timed."""
        program = ModelProgram("model", "encode", 1, self.compute, clock=self.clock)
        program.measure(max_rows, rows(1)[0])
        self.batches.clear()
        self.threads.clear()
        return program


def rows(count: int) -> Arrays:
    return (np.zeros((count, 2), np.float32),)


@pytest.mark.parametrize(("one", "further"), [(1e-4, 1e-5), (3e-3, 1e-3), (0.2, 0.0)])
def test_the_cost_of_a_batch_is_on_the_line_that_was_measured(one: float, further: float) -> None:
    """Also of sizes that were not timed."""
    program = Computer(lambda n: one + (n - 1) * further).measured()
    for size in (1, 2, 33, 64):
        assert program.cost_s(size) == pytest.approx(one + (size - 1) * further)


def test_the_best_of_a_few_measurements_counts() -> None:
    """The first, cold one does not."""
    seconds = iter([0.012, 0.004, 0.005])
    assert Computer(lambda _: next(seconds)).measured(1).cost_s(1) == pytest.approx(0.004)


def test_what_takes_long_is_timed_once() -> None:
    """So that a large model starts soon: of one row and of four, which are no cheaper, and of no more."""
    computer = Computer(lambda n: 0.5 * n)
    ModelProgram("model", "encode", 1, computer.compute, clock=computer.clock).measure(64, rows(1)[0])
    assert computer.batches == [1, 4]


@pytest.mark.parametrize(
    ("one", "further", "best"),
    [
        (1e-3, 1e-6, 64),  # the overhead is shared by as many as there may be
        (2e-3, 1e-3, 16),  # 16 rows cost 1.075 ms each, 64 cost 1.019
        (1e-2, 1e-2, 1),  # sharing gains nothing
    ],
)
def test_batches_are_as_large_as_pays(one: float, further: float, best: int) -> None:
    """Within a tenth of the cheapest row; in the batcher too, where many more wait."""

    async def scenario() -> None:
        computer = Computer(lambda n: one + (n - 1) * further)
        program, engine = computer.measured(), Batcher(max_rows=64, queue_rows=1000)
        await asyncio.gather(*(engine.submit(program, rows(1)) for _ in range(128)))
        assert program.batch_rows(64) == best
        assert computer.batches == [best] * (128 // best)
        await engine.close()

    asyncio.run(scenario())


def test_what_costs_little_runs_in_the_event_loop() -> None:
    """Down to the size of the batch: one row of this program costs less than is allowed there, eight do not."""

    async def scenario() -> None:
        computer = Computer(lambda n: 5e-5 * n)
        program, engine = computer.measured(8), Batcher(max_rows=8, queue_rows=64, inline_s=2e-4)
        for size in (1, 8):
            await engine.submit(program, rows(size))
        here = threading.get_ident()
        assert [thread == here for thread in computer.threads] == [True, False]
        await engine.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("seconds", [0.02, 3.0])
def test_who_comes_is_told_how_long_what_waits_will_take(seconds: float) -> None:
    """At the rate of the last batches; work is taken where it fits into the request's time, else refused at once."""

    async def scenario() -> None:
        computer = Computer(lambda _: seconds, until=61)
        program = ModelProgram("model", "encode", 1, computer.compute)
        engine = Batcher(max_rows=1, queue_rows=80, clock=computer.clock)
        waiting = [asyncio.create_task(engine.submit(program, rows(1))) for _ in range(80)]
        await until(lambda: len(computer.batches) == 61)
        left = engine.queued_rows
        assert left == 19
        assert engine.drain_s() == pytest.approx(left * seconds, rel=1e-3)
        with pytest.raises(Overloaded, match="too long") as hurried:
            await engine.submit(program, rows(1), deadline=computer.now + 0.9 * left * seconds)
        assert hurried.value.retry_after_s == pytest.approx(left * seconds, rel=1e-3)
        waiting.append(asyncio.create_task(engine.submit(program, rows(1), deadline=computer.now + 3 * left * seconds)))
        await asyncio.sleep(0)
        assert engine.queued_rows == left + 1
        computer.gate.set()
        await asyncio.gather(*waiting)
        assert len(computer.batches) == 81
        await engine.close()

    asyncio.run(scenario())


def test_a_caller_is_told_where_its_time_went() -> None:
    """In the queue, and in the batch; what observes is told the same."""

    async def scenario() -> None:
        told: list[tuple[list[float], float]] = []

        def observe(_program: Program, _rows: int, queue_s: list[float], inference_s: float) -> None:
            told.append((queue_s, inference_s))

        computer = Computer(lambda n: 0.25 * n)
        program = ModelProgram("model", "encode", 1, computer.compute)
        engine = Batcher(max_rows=2, queue_rows=64, clock=computer.clock, observe=observe)
        trips: list[Trip] = await asyncio.gather(*(engine.submit(program, rows(count)) for count in (2, 1)))
        assert [(trip.queue_s, trip.inference_s) for trip in trips] == [(0.0, 0.5), (0.5, 0.25)]
        assert told == [([0.0], 0.5), ([0.5], 0.25)]
        await engine.close()

    asyncio.run(scenario())


def test_estimates_and_durations_reach_the_headers() -> None:
    """Retry-After in whole seconds, rounded up; Server-Timing in milliseconds."""
    retry_after = [describe(Overloaded("later", seconds))[3]["retry-after"] for seconds in (0.01, 1.0, 6.2)]
    assert retry_after == ["1", "1", "7"]
    assert server_timing(0.0012, 0.0345) == "queue;dur=1.200, inference;dur=34.500"


def test_what_is_told_of_a_request_lies_between_its_work_and_its_callers_wait(
    small: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    """In Server-Timing, the metrics and the access log."""
    caplog.set_level(logging.INFO, "service.access")
    model = small.find("mnist-2d", None)

    def decoder(z: NDArray[np.float32]) -> Arrays:
        time.sleep(0.05)
        return model.graphs["decoder"](z)

    slow = Model(model.manifest, {**model.graphs, "decoder": decoder})  # type: ignore[dict-item]
    app = create_app(Settings(access_log=True), Repository({"slow": {"1": slow}}, "slow"))

    async def scenario() -> tuple[float, httpx.Response, str]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            began = time.perf_counter()
            answer = await client.post("/v1/sample")
            return time.perf_counter() - began, answer, (await client.get("/metrics")).text

    waited_s, answer, metrics = asyncio.run(scenario())
    told = float(answer.headers["server-timing"].rpartition("=")[2]) / 1e3
    (counted,) = re.findall(r"^vae_inference_seconds_sum\{.*\} (.*)$", metrics, re.MULTILINE)
    logged = next(record for record in caplog.records if record.name == "service.access").__dict__["duration_ms"] / 1e3
    assert 0.05 <= told <= waited_s
    assert float(counted) == pytest.approx(told, abs=1e-6)
    assert told <= logged <= waited_s


def test_a_model_serves_with_the_times_of_its_trial() -> None:
    """Each measured by itself, to the nanosecond: they are not all alike."""
    model = open_model(MODELS / "mnist-2d" / "1", "CPUExecutionProvider", 1, 64)
    times = [seconds for program in model.programs.values() for seconds in (program.timing or {}).values()]
    assert len(times) >= 8
    assert len(set(times)) > 1
