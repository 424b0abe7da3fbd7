"""Long work that tells how it goes: events over a real socket, read by the rules of the HTML standard."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from service.api.progress import Event, watched
from service.app import create_app
from service.codecs.payload import Answer
from service.operations.inference.refinement import STEPS, WINDOW
from service.repository.repository import Repository
from service.runtime.model import Model
from service.settings import Settings

SSE, LINES, JSON = "text/event-stream", "application/x-ndjson", "application/json"
REFINED = "/v1/denoise?level=0.2&quality=refined&seed=4"
Rows = NDArray[np.float32]
Serve = Callable[[FastAPI], AbstractContextManager[str]]
Told = list[tuple[str, dict[str, Any]]]
Observe = Callable[[Answer], None]


def of_event_stream(body: bytes) -> Told:
    """Source: HTML standard, 9.2.6: what no blank line ends is no event, nor is what has no data."""
    events, kind, data = [], "", []
    *lines, _ = re.split(r"\r\n|\n|\r", body.decode().removeprefix("\ufeff"))
    for line in lines:
        field, _, value = line.partition(":")
        if not line:
            if data:
                events.append((kind or "message", json.loads("\n".join(data))))
            kind, data = "", []
        elif field == "event":
            kind = value.removeprefix(" ")
        elif field == "data":
            data.append(value.removeprefix(" "))
    return events


def of_lines(body: bytes) -> Told:
    assert body.endswith(b"\n")
    told = [json.loads(line) for line in body.splitlines()]
    return [(event.pop("event"), event) for event in told]


PARSERS = {SSE: of_event_stream, LINES: of_lines}


def post(client: httpx.Client, path: str, accept: str, **request: Any) -> Told:
    """The events of an answer."""
    answer = client.post(path, headers={"accept": accept}, **request)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == accept
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-model"] == "digits"
    return PARSERS[accept](answer.content)


def plain(client: httpx.Client, path: str, **request: Any) -> dict[str, Any]:
    answer = client.post(path, headers={"accept": JSON}, **request)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.fixture(scope="module")
def body(images: Rows) -> dict[str, Any]:
    """Noisy images, as JSON."""
    noise = 0.2 * np.random.default_rng(1).standard_normal(images.shape)
    return {"images": (images + noise).tolist()}


@pytest.mark.parametrize("accept", [SSE, LINES])
def test_progress_and_then_the_plain_answer(client: httpx.Client, body: dict[str, Any], accept: str) -> None:
    """Window after window, rows coming to rest, the bound rising; every number of the answer is the plain one's."""
    *progress, answer = post(client, REFINED, accept, json=body)
    assert {kind for kind, _ in progress} == {"progress"}
    told = [event for _, event in progress]
    assert [event["step"] for event in told] == list(range(WINDOW, WINDOW * len(told) + 1, WINDOW))
    assert len(told) > 1
    assert all(event["steps"] == STEPS and len(event["elbo"]) == 3 and "images" not in event for event in told)
    assert [event["active"] for event in told] == sorted((event["active"] for event in told), reverse=True)
    assert np.mean(told[-1]["elbo"]) > np.mean(told[0]["elbo"])
    assert answer == ("answer", plain(client, REFINED, json=body))
    assert told[-1]["elbo"] == answer[1]["elbo"]


def test_the_data_of_the_answer_are_the_bytes_of_the_json_answer(client: httpx.Client, body: dict[str, Any]) -> None:
    """One codec writes both."""
    streamed = client.post(REFINED, json=body, headers={"accept": SSE}).content
    whole = client.post(REFINED, json=body).content
    assert streamed.endswith(b"event: answer\ndata: " + whole + b"\n\n")


def test_a_preview_comes_nearer_to_the_answer(client: httpx.Client, body: dict[str, Any]) -> None:
    """And ends there, also at a level that is found on the way; the answer is the same with it and without."""
    path = "/v1/denoise?quality=refined&seed=4"
    *progress, (_, answer) = post(client, f"{path}&preview=true", LINES, json=body)
    off = [np.abs(np.subtract(event["images"], answer["images"])).max() for _, event in progress]
    assert off[0] > off[-1] == 0.0
    assert answer == plain(client, path, json=body) == plain(client, f"{path}&preview=true", json=body)


def test_progress_of_tiles_is_told_of_images(client: httpx.Client, body: dict[str, Any]) -> None:
    """One bound an image, and previews of its size."""
    page = {"images": np.concatenate([np.concatenate(body["images"], 2)[None]] * 2).tolist()}
    *progress, (_, answer) = post(client, f"{REFINED}&fit=tile&preview=true", SSE, json=page)
    assert np.shape(answer["images"]) == (2, 1, 8, 24)
    for _, event in progress:
        assert np.shape(event["images"]) == (2, 1, 8, 24)
        assert np.shape(event["elbo"]) == (2,)


@pytest.mark.parametrize("accept", [SSE, LINES])
@pytest.mark.parametrize("path", ["sample?seed=3&count=300", "encode?draws=2&seed=1", "denoise", "super-resolve"])
def test_short_work_is_one_event(client: httpx.Client, body: dict[str, Any], path: str, accept: str) -> None:
    """Its answer, whatever the operation, however many rows."""
    sent = {} if path.startswith("sample") else {"json": {"images": np.clip(body["images"], 0, 1).tolist()}}
    if path == "super-resolve":
        sent = {"json": {"images": np.asarray(body["images"])[..., ::2, ::2].tolist()}}
    assert post(client, f"/v1/{path}", accept, **sent) == [("answer", plain(client, f"/v1/{path}", **sent))]


def test_events_are_for_those_who_ask_for_them(client: httpx.Client) -> None:
    """By name, in the order of the q-values; pictures may be asked with, and what cannot be had is still 406."""
    forms = {
        "*/*": JSON,
        "application/*": JSON,
        f"{SSE};q=0.5, {JSON}": JSON,
        f"{JSON};q=0.5, {SSE}": SSE,
        f"text/html, {LINES};q=0.1": LINES,
    }
    for accept, form in forms.items():
        assert client.post("/v1/sample", headers={"accept": accept}).headers["content-type"] == form
    refused = client.post("/v1/sample", headers={"accept": "text/html"})
    assert (refused.status_code, refused.json()["code"]) == (406, "not_acceptable")
    assert SSE in refused.json()["detail"]
    picture = client.post("/v1/sample", headers={"accept": "image/png"}).content
    headers = {"content-type": "image/png", "accept": SSE}
    ((kind, _),) = of_event_stream(client.post("/v1/encode", content=picture, headers=headers).content)
    assert kind == "answer"


def test_what_goes_wrong_before_the_first_event_is_a_plain_problem(client: httpx.Client, body: dict[str, Any]) -> None:
    """With its status, whatever was to be streamed."""
    wrong = client.post(f"{REFINED}&draws=-1", json=body, headers={"accept": SSE})
    assert (wrong.status_code, wrong.headers["content-type"]) == (422, "application/problem+json")
    unread = client.post(REFINED, content=b"x", headers={"accept": SSE, "content-type": "text/csv"})
    assert (unread.status_code, unread.json()["code"]) == (415, "unsupported_media_type")
    late = client.post(REFINED, json=body, headers={"accept": SSE, "x-timeout-ms": "1"})
    assert (late.status_code, late.json()["code"]) == (504, "deadline_passed")


@pytest.fixture
def thinking(digits_models: Path) -> Callable[[Callable[[int], float]], tuple[Repository, list[float]]]:
    """A function that gives the model, whose refinement thinks some seconds about each step, and when it was asked."""

    def repository(seconds: Callable[[int], float]) -> tuple[Repository, list[float]]:
        model = Repository.open(digits_models, "", "CPUExecutionProvider", 1, 8).find("digits", None)
        asked: list[float] = []

        def refinement(*arrays: Rows) -> tuple[Rows, ...]:
            asked.append(time.monotonic())
            time.sleep(seconds(len(asked)))
            return model.graphs["refinement"](*arrays)

        graphs = {**model.graphs, "refinement": refinement}
        thoughtful = Model(model.manifest, graphs)  # type: ignore[arg-type]
        return Repository({"digits": {"1": thoughtful}}, "digits"), asked

    return repository


def outcomes(client: httpx.Client) -> dict[str, float]:
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    (queued,) = families["vae_queued_rows"].samples
    counted = {s.labels["outcome"]: s.value for s in families["vae_requests"].samples if s.name.endswith("_total")}
    return {"queued": queued.value, **counted}


@pytest.mark.parametrize(
    ("accept", "seconds", "known"), [(SSE, 4.0, (504, "deadline_passed")), (LINES, -1.0, (500, "inference_failed"))]
)
def test_what_goes_wrong_later_is_the_last_event(
    thinking: Callable[..., tuple[Repository, list[float]]],
    serve: Serve,
    body: dict[str, Any],
    accept: str,
    seconds: float,
    known: tuple[int, str],
) -> None:
    """Time that runs out, or a graph that fails, in the second window: a problem, and the stream ends in good order."""
    repository, asked = thinking(lambda step: seconds if step == WINDOW + 2 else 0.0)  # -1 s of sleep is an error
    with serve(create_app(Settings(), repository)) as url, httpx.Client(base_url=url, timeout=60) as client:
        answer = client.post(REFINED, json=body, headers={"accept": accept, "x-timeout-ms": "4000"})
        assert answer.status_code == 200, answer.text
        (_, progress), (kind, problem) = PARSERS[accept](answer.content)
        assert progress["step"] == WINDOW
        assert (kind, problem["status"], problem["code"]) == ("error", *known)
        assert len(asked) == WINDOW + 2
        assert outcomes(client) == {"queued": 0, known[1]: 1}


def test_the_first_event_does_not_wait_for_the_answer_and_who_leaves_stops_the_work(
    thinking: Callable[..., tuple[Repository, list[float]]], serve: Serve, body: dict[str, Any]
) -> None:
    """A caller that hangs up after an event: few slices more are computed, and the queue is empty."""
    left = threading.Event()

    def pace(step: int) -> float:
        if step == WINDOW + 2:
            assert left.wait(20)
        return 0.02

    repository, asked = thinking(pace)
    with serve(create_app(Settings(), repository)) as url, httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", REFINED, json=body, headers={"accept": SSE}) as answer:
            assert next(answer.iter_lines()) == "event: progress"
        steps = len(asked)
        left.set()
        assert WINDOW <= steps <= WINDOW + 2
        end = time.monotonic() + 10
        while "caller_gone" not in outcomes(client) and time.monotonic() < end:
            time.sleep(0.02)
        assert outcomes(client) == {"queued": 0, "caller_gone": 1}
        assert len(asked) < steps + WINDOW
        steps = len(asked)
        time.sleep(0.2)
        assert len(asked) == steps


def answer_of(step: int) -> Answer:
    return Answer({}, {"step": step})


def test_a_slow_reader_gets_the_newest_and_the_answer() -> None:
    """What it had no time for is neither kept nor waited for."""

    class Estimate:
        """As large as may be."""

    kept: weakref.WeakSet[Estimate] = weakref.WeakSet()

    async def run(observe: Observe) -> Answer:
        for step in range(1, 1001):
            estimate = Estimate()
            kept.add(estimate)
            observe(Answer({}, {"step": step, "estimate": estimate}))
            await asyncio.sleep(0)
        assert len(kept) < 5
        return answer_of(-1)

    async def read() -> list[tuple[str, int]]:
        found = []
        async for event in watched(run):
            assert event is not None
            found.append((event.kind, event.answer.about["step"]))
            await asyncio.sleep(0 if len(found) == 1 else 0.05)
        return found

    first, *between, answer = asyncio.run(read())
    assert first[0] == "progress"
    assert len(between) < 5
    assert answer == ("answer", -1)


def test_silence_is_said_and_leaving_cancels() -> None:
    """None while nothing is new; the work does not outlive its watcher."""
    ended = []

    async def run(observe: Observe) -> Answer:
        try:
            observe(answer_of(1))
            await asyncio.sleep(60)
        finally:
            ended.append(True)
        return answer_of(-1)

    async def read() -> list[Event | None]:
        found: AsyncGenerator[Event | None, None] = watched(run, 0.01)
        async with aclosing(found):
            events = [await anext(found) for _ in range(3)]
        await asyncio.sleep(0)
        assert ended == [True]
        return events

    assert asyncio.run(read()) == [Event("progress", answer_of(1)), None, None]


def test_streams_are_documented_with_examples_that_parse(client: httpx.Client) -> None:
    """Of every operation, progress of those alone that may be long."""
    paths = client.get("/openapi.json").json()["paths"]
    for operation, kinds in (("denoise", ["progress", "answer"]), ("sample", ["answer"])):
        content = paths[f"/v1/{operation}"]["post"]["responses"]["200"]["content"]
        for form, parse in PARSERS.items():
            assert [kind for kind, _ in parse(content[form]["example"].encode())] == kinds
            assert "`progress`" in content[form]["schema"]["description"]
