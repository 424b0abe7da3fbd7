"""A batch that does not come back: nobody waits for it for ever, and the process can end."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.errors import DeadlinePassed, InferenceFailed, NotReady, Overloaded
from service.repository.repository import Repository
from service.runtime.batcher import Batcher
from service.runtime.model import Model
from service.runtime.program import Arrays
from service.runtime.thread import ComputingThreads
from service.runtime.watchdog import WATCH_S
from service.settings import Settings

ONE = (np.ones((1, 2), np.float32),)
ROOT = Path(__file__).parents[2]
RAW = {"content-type": "application/octet-stream"}


class Gated:
    """A program that waits for a gate."""

    rounds, free = 1, None

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()

    def run(self, *arrays: Any) -> Arrays:
        """What was sent, once the gate is open."""
        self.entered.set()
        self.gate.wait(20)
        return arrays

    def batch_rows(self, max_rows: int) -> int:
        """All."""
        return max_rows

    def cost_s(self, _rows: int) -> float:
        """Too much for the event loop."""
        return 1.0


def engine(**changes: Any) -> Batcher:
    return Batcher(**{"max_rows": 1, "queue_rows": 64, **changes})


async def begun(gated: Gated) -> None:
    assert await asyncio.to_thread(gated.entered.wait, 10)


def test_whose_time_is_up_is_told_although_the_batch_hangs() -> None:
    """In the batch and behind it, each at its own deadline; who has time still gets the answer."""

    async def scenario() -> None:
        gated, batcher, now = Gated(), engine(), time.monotonic()
        tasks = [asyncio.create_task(batcher.submit(gated, ONE, deadline=now + s)) for s in (0.2, 0.4, 20.0)]
        for task, seconds in zip(tasks[:2], (0.2, 0.4), strict=True):
            with pytest.raises(DeadlinePassed):
                await task
            assert time.monotonic() - now >= seconds
        assert not tasks[2].done()
        gated.gate.set()
        assert (await tasks[2]).arrays[0].shape == (1, 2)
        await batcher.close()

    asyncio.run(scenario())


def test_a_stuck_batch_is_found_out_and_forgiven_when_it_comes_back() -> None:
    """Everybody is answered, new work is refused, it is told once; after it has come back all is well again."""

    async def scenario() -> None:
        told: list[int] = []
        gated, batcher = Gated(), engine(batch_limit_s=0.2, on_failure=lambda: told.append(1))
        running, waiting = (asyncio.create_task(batcher.submit(gated, ONE)) for _ in range(2))
        with pytest.raises(InferenceFailed):
            await running
        with pytest.raises(NotReady):
            await waiting
        assert not batcher.healthy
        with pytest.raises(NotReady):
            await batcher.submit(gated, ONE)
        await asyncio.sleep(0.3)
        assert told == [1]
        gated.gate.set()
        async with asyncio.timeout(20):
            while not batcher.healthy:  # noqa: ASYNC110  # what is waited for is in a thread
                await asyncio.sleep(0.01)
        assert (await batcher.submit(gated, ONE)).arrays[0].shape == (1, 2)
        assert batcher.queued_rows == 0
        await batcher.close()

    asyncio.run(scenario())


def test_many_batches_in_one_go_are_not_stuck() -> None:
    """The limit is of a batch, not of the request, and none lies on a thread without work."""

    async def scenario() -> None:
        now = [0.0]

        class Steady(Gated):
            def run(self, *arrays: Any) -> Arrays:
                time.sleep(WATCH_S / 2)  # so that it is looked
                now[0] += 1.0
                return arrays

        batcher = engine(batch_limit_s=2.5, clock=lambda: now[0])
        await batcher.submit(Steady(), (np.ones((8, 2), np.float32),))
        now[0] += 10.0
        await asyncio.sleep(2 * WATCH_S)
        await batcher.submit(Steady(), ONE)
        assert batcher.healthy
        await batcher.close()

    asyncio.run(scenario())


def test_closing_does_not_wait_for_a_batch_that_nobody_waits_for() -> None:
    """Once its last caller has been told that the time is up."""

    async def scenario() -> None:
        gated, batcher, started = Gated(), engine(), time.monotonic()
        caller = asyncio.create_task(batcher.submit(gated, ONE, deadline=started + 0.3))
        await begun(gated)
        await batcher.close()
        assert batcher.running
        with pytest.raises(DeadlinePassed):
            await caller
        gated.gate.set()

    asyncio.run(scenario())


def test_a_process_ends_although_its_thread_hangs() -> None:
    """The interpreter does not wait for it."""
    script = (
        "import threading, time\nfrom service.runtime.thread import ComputingThreads\nentered = threading.Event()\n"
        "one = ComputingThreads('hangs')\none.run(lambda: (entered.set(), time.sleep(60)))\nentered.wait()\n"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=20, check=False).returncode == 0


def test_a_thread_ends_with_its_owner() -> None:
    """Nobody needs to close it."""
    ran = threading.Event()
    owner = ComputingThreads("short-lived")
    owner.run(ran.set)
    assert ran.wait(5)
    (thread,) = owner._threads
    del owner
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_batch_without_memory_fails_alone() -> None:
    """Its callers may come back, and the next batch runs."""

    class Greedy(Gated):
        def run(self, *arrays: Any) -> Arrays:
            if len(arrays[0]) > 1:
                raise MemoryError
            return arrays

    async def scenario() -> None:
        batcher = engine(max_rows=8)
        with pytest.raises(Overloaded, match="memory"):
            await batcher.submit(Greedy(), (np.ones((2, 2), np.float32),))
        assert (await batcher.submit(Greedy(), ONE)).arrays[0].shape == (1, 2)
        await batcher.close()

    asyncio.run(scenario())


def test_a_bug_while_answers_are_handed_out_leaves_nobody_waiting() -> None:
    """Whoever was in the batch is told, and whoever is to restart the service."""

    class Unsliceable:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, _: Any) -> Any:
            raise ZeroDivisionError

    class Confused(Gated):
        def run(self, *_: Any) -> Any:
            return (Unsliceable(),)

    async def scenario() -> None:
        told = asyncio.Event()
        batcher = engine(on_failure=told.set)
        with pytest.raises(InferenceFailed):
            await asyncio.wait_for(batcher.submit(Confused(), ONE), 5)
        assert told.is_set()
        assert not batcher.healthy
        await batcher.close()

    asyncio.run(scenario())


def test_callers_of_a_hanging_model_get_504_and_readiness_turns_false(
    digits_models: Path, serve: Callable[..., Any]
) -> None:
    """Over HTTP: 504 at the deadline; then 503 to all who come, and whoever is to restart the service hears of it."""
    gate, stuck = threading.Event(), threading.Event()
    good = Repository.open(digits_models, "", "CPUExecutionProvider", 1, 8).find("digits", None)

    def hanging(z: Any) -> Any:
        gate.wait(20)
        return good.graphs["decoder"](z)

    model = Model(good.manifest, {**good.graphs, "decoder": hanging})  # type: ignore[dict-item]
    repository = Repository({"digits": {"1": model}}, "digits")

    def late(client: httpx.Client) -> bool:
        answer = client.post("/v1/decode", content=bytes(32), headers={"x-timeout-ms": "300"})
        return (answer.status_code, answer.json()["code"]) == (504, "deadline_passed")

    with (
        serve(create_app(Settings(), repository)) as url,
        httpx.Client(base_url=url, headers=RAW, timeout=10) as client,
    ):
        assert late(client)
        assert client.get("/health/ready").status_code == 200
    app = create_app(Settings(batch_limit_s=1.0), repository, stuck.set)
    with serve(app) as url, httpx.Client(base_url=url, headers=RAW, timeout=10) as client:
        assert late(client)
        assert stuck.wait(10)
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
        assert client.post("/v1/decode", content=bytes(32)).json()["code"] == "not_ready"
        gate.set()
        end = time.monotonic() + 20
        while client.get("/health/ready").status_code != 200 and time.monotonic() < end:
            time.sleep(0.01)
        assert client.post("/v1/decode", content=bytes(32)).status_code == 200
