"""What callers hear when the service, not the request, is the trouble."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from service.app import create_app
from service.repository.repository import Repository
from service.runtime.model import Model
from service.settings import Settings

Slow = Callable[[Callable[[], object]], Repository]
RAW = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}
ONE = np.zeros((1, 8), "<f4").tobytes()
LARGE = np.zeros((16384, 8), "<f4").tobytes()


@asynccontextmanager
async def client(settings: Settings, repository: Repository | None = None) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(settings, repository))
    async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=RAW, timeout=60) as one:
        yield one


def decode(one: httpx.AsyncClient, body: bytes, **headers: str) -> Coroutine[Any, Any, httpx.Response]:
    return one.post("/v1/decode", content=body, headers={**RAW, **headers})


def test_a_full_queue_is_503_with_a_time_to_come_back(digits_models: Path) -> None:
    """What was accepted is answered; what was refused says which setting and when."""

    async def scenario() -> None:
        async with client(Settings(models=digits_models, max_rows=8, queue_rows=8)) as one:
            answers = await asyncio.gather(decode(one, LARGE), *(decode(one, ONE) for _ in range(20)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert answers[0].status_code == 200
        assert len(answers[0].content) == 16384 * 64 * 4
        assert refused
        for answer in refused:
            assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
            assert "VAE_QUEUE_ROWS" in answer.json()["detail"]
            assert int(answer.headers["retry-after"]) >= 1

    asyncio.run(scenario())


def test_a_passed_deadline_is_504(slow: Slow) -> None:
    """A caller whose request's time runs out behind a batch is told so."""
    entered, gate = threading.Event(), threading.Event()

    async def scenario() -> None:
        async with client(Settings(), slow(lambda: (entered.set(), gate.wait(20)))) as one:
            first = asyncio.create_task(decode(one, ONE))
            await asyncio.to_thread(entered.wait, 20)
            late = await decode(one, ONE, **{"x-timeout-ms": "10"})
            assert (late.status_code, late.json()["code"]) == (504, "deadline_passed")
            gate.set()
            assert (await first).status_code == 200

    asyncio.run(scenario())


def test_what_cannot_be_done_in_time_is_503_at_once(slow: Slow) -> None:
    """A request is not queued where what waits before it takes longer than it has; who has time is answered."""
    begun, entered, gate = itertools.count(1), threading.Event(), threading.Event()

    def think() -> None:
        if next(begun) <= 10:
            time.sleep(0.02)
        else:
            entered.set()
            gate.wait(20)

    async def scenario() -> None:
        async with client(Settings(max_rows=1), slow(think)) as one:
            waiting = [asyncio.create_task(decode(one, ONE)) for _ in range(20)]
            await asyncio.to_thread(entered.wait, 20)
            hurried = await decode(one, ONE, **{"x-timeout-ms": "50"})
            gate.set()
            assert (hurried.status_code, hurried.json()["code"]) == (503, "overloaded")
            assert int(hurried.headers["retry-after"]) >= 1
            assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}

    asyncio.run(scenario())


def test_a_failing_model_is_500_without_its_secrets(digits_models: Path) -> None:
    """The cause is for the log; the next model's callers do not notice."""
    good = Repository.open(digits_models, "", "CPUExecutionProvider", 1, 8).find("digits", None)

    def failing(*_: Any) -> Any:
        raise RuntimeError("a secret path")

    bad = Model(good.manifest, {**good.graphs, "decoder": failing})  # type: ignore[dict-item]
    both = Repository({"good": {"1": good}, "bad": {"1": bad}}, "good")

    async def scenario() -> None:
        async with client(Settings(), both) as one:
            failed = await one.post("/v1/models/bad/decode", content=ONE)
            assert (failed.status_code, failed.json()["code"]) == (500, "inference_failed")
            assert "secret" not in failed.text
            assert (await one.post("/v1/models/good/decode", content=ONE)).status_code == 200

    asyncio.run(scenario())


def test_a_bug_is_500_with_an_id_and_nothing_else(digits_models: Path) -> None:
    """Whatever breaks outside a batch is a problem like every other, and is logged under its id."""

    class Confused(Repository):
        def find(self, _name: str | None, _version: str | None) -> Model:
            """Never."""
            raise ZeroDivisionError("a secret path")

    async def scenario() -> None:
        async with client(Settings(models=digits_models), Confused({}, "")) as one:
            answer = await decode(one, ONE)
            assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
            assert "secret" not in answer.text

    asyncio.run(scenario())


def test_a_noise_that_a_model_was_not_trained_for_is_refused_by_name(digits_models: Path) -> None:
    """What a model knows is said by its manifest, not by the service."""
    full = Repository.open(digits_models, "", "CPUExecutionProvider", 1, 8).find("digits", None)
    manifest = full.manifest.model_copy(update={"noise_families": ["gaussian", "rain", "masking", "poisson"]})
    repository = Repository({"digits": {"1": Model(manifest, full.graphs)}}, "digits")

    async def scenario() -> None:
        async with client(Settings(), repository) as one:
            body = np.zeros((1, 64), "<f4").tobytes()
            refused = await one.post("/v1/denoise?noise=salt-and-pepper", content=body)
            assert (refused.status_code, refused.json()["code"]) == (422, "unsupported_operation")
            assert "gaussian, rain, masking, poisson and none" in refused.json()["detail"]
            assert (await one.post("/v1/denoise?noise=masking", content=body)).status_code == 200

    asyncio.run(scenario())
