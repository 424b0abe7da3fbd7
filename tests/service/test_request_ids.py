"""Request ids: accepted or given, echoed on every answer, told in the log; the access log; the log as JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.repository.repository import Repository
from service.runtime.model import Model
from service.settings import Settings

ROOT = Path(__file__).parents[2]
RAW = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}
OURS = re.compile(r"[0-9a-f]{12}-[0-9a-f]+")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}


@asynccontextmanager
async def asking(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
        yield client


def test_every_answer_has_the_callers_id(small: Repository) -> None:
    """Arrays, events, problems, unknown paths, documents: whatever is asked."""

    async def scenario() -> None:
        async with asking(create_app(Settings(), small)) as client:
            for method, path, accept in (
                ("POST", "/v1/sample", "application/json"),
                ("POST", "/v1/sample?count=600", "application/octet-stream"),
                ("POST", "/v1/sample", "text/event-stream"),
                ("POST", "/v1/sample?count=0", "*/*"),
                ("POST", "/v1/models/nobody/sample", "*/*"),
                ("GET", "/v1/models", "*/*"),
                ("GET", "/nowhere", "*/*"),
                ("DELETE", "/v1/sample", "*/*"),
                ("GET", "/health/ready", "*/*"),
                ("GET", "/metrics", "*/*"),
                ("GET", "/openapi.json", "*/*"),
            ):
                answer = await client.request(method, path, headers={"x-request-id": "req-1/a", "accept": accept})
                assert answer.headers.get_list("x-request-id") == ["req-1/a"], path

    asyncio.run(scenario())


@pytest.mark.parametrize("told", ["", "a b", "x" * 129, 'a"b', "a\tb", "é", "<script>", "a;b"])
def test_an_id_that_is_not_short_and_plain_is_replaced(small: Repository, told: str) -> None:
    """By one of ours, another for every request."""

    async def scenario() -> None:
        async with asking(create_app(Settings(), small)) as client:
            headers = {"x-request-id": told.encode("latin-1")}
            given = [(await client.get("/health/live", headers=headers)).headers["x-request-id"] for _ in range(2)]
            assert all(OURS.fullmatch(identity) for identity in given)
            assert given[0] != given[1]

    asyncio.run(scenario())


class Confused(Repository):
    """Breaks whoever asks it."""

    def find(self, _name: str | None, _version: str | None, _operation: str = "") -> Model:
        """Never."""
        raise ZeroDivisionError("a secret path")


def test_a_bug_is_told_and_logged_under_the_requests_id(caplog: pytest.LogCaptureFixture) -> None:
    """In an operation and anywhere else; the caller sees the id, the log the cause."""

    async def scenario() -> None:
        async with asking(create_app(Settings(), Confused({}, ""))) as client:
            for method, path in (("POST", "/v1/sample"), ("GET", "/v1/models/x")):
                caplog.clear()
                answer = await client.request(method, path, headers={"x-request-id": "abc-1"})
                assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
                assert answer.headers["x-request-id"] == "abc-1"
                assert answer.json()["detail"].endswith("under abc-1")
                assert "secret" not in answer.text
                (logged,) = (record for record in caplog.records if "abc-1" in record.getMessage())
                assert "a secret path" in str(logged.exc_info)

    asyncio.run(scenario())


def test_a_failed_batch_is_logged_for_each_of_its_requests(small: Repository, caplog: pytest.LogCaptureFixture) -> None:
    """Under the ids that their callers know."""
    good = small.find("mnist-2d", None)

    def failing(*_: Any) -> Any:
        raise RuntimeError("broken")

    bad = Repository({"bad": {"1": Model(good.manifest, {**good.graphs, "decoder": failing})}}, "bad")  # type: ignore[dict-item]

    async def scenario() -> None:
        async with asking(create_app(Settings(), bad)) as client:
            await asyncio.gather(
                *(client.post("/v1/sample", headers={"x-request-id": name}) for name in ("a-1", "b-2"))
            )

    asyncio.run(scenario())
    told = [record.getMessage() for record in caplog.records if record.name == "service.api.problems"]
    assert sorted(line.split(":")[0] for line in told) == ["request a-1", "request b-2"]


def test_the_access_log_says_what_was_asked_and_what_came_of_it(
    small: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    """One record a request; neither bodies nor credentials nor line breaks of the caller's."""
    caplog.set_level(logging.INFO, "service.access")

    async def scenario() -> None:
        async with asking(create_app(Settings(access_log=True), small)) as client:
            body = np.zeros((2, 784), "<f4").tobytes()
            secret = {"authorization": "Bearer hidden-key", "x-request-id": "r1"}
            await client.post("/v1/encode?draws=0&seed=3", content=body, headers={**RAW, **secret})
            await client.get("/a%0AINFO:%20forged")

    asyncio.run(scenario())
    first, second = (record for record in caplog.records if record.name == "service.access")
    told = first.__dict__
    assert (told["method"], told["path"], told["status"]) == ("POST", "/v1/encode?draws=0&seed=3", 200)
    assert (told["model"], told["operation"], told["outcome"], told["rows"]) == ("mnist-2d", "encode", "ok", 2)
    assert 0 < told["duration_ms"] < 60_000
    assert re.fullmatch(r'127.0.0.1:123 "POST /v1/encode\?draws=0&seed=3" 200 [\d.]+ ms r1', first.getMessage())
    assert "hidden-key" not in str(told)
    assert (second.__dict__["status"], "\n" in second.getMessage()) == (404, False)


def test_the_access_log_names_the_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By its name, also where it is refused; a key that is not known has none."""
    caplog.set_level(logging.INFO, "service.access")
    keys = tmp_path / "keys"
    keys.write_text("alice alice-0123456789abcdef control\n")

    async def scenario() -> None:
        async with asking(create_app(Settings(access_log=True, api_keys=str(keys)), Repository({}, ""))) as client:
            for token in ("alice-0123456789abcdef", "guess-0123456789abcdef"):
                headers = {"authorization": f"Bearer {token}", "x-request-id": "r1"}
                await client.get("/v1/models", headers=headers)
                await client.post("/v1/encode", headers=headers)

    asyncio.run(scenario())
    told = [record for record in caplog.records if record.name == "service.access"]
    named = [(record.__dict__["status"], record.__dict__.get("key")) for record in told]
    assert named == [(200, "alice"), (403, "alice"), (401, None), (401, None)]
    assert re.fullmatch(r'127.0.0.1:123 alice "GET /v1/models" 200 [\d.]+ ms r1', told[0].getMessage())
    assert not any("0123456789" in str(record.__dict__) for record in told)


def test_without_the_access_log_nothing_is_logged(small: Repository, caplog: pytest.LogCaptureFixture) -> None:
    """It is off by default."""
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        async with asking(create_app(Settings(), small)) as client:
            await client.post("/v1/sample")

    asyncio.run(scenario())
    assert not [record for record in caplog.records if record.name.startswith("service")]


def test_as_json_every_line_is_an_object(small_models: Path) -> None:
    """Of a real process from start to end, the service's lines and uvicorn's; a request's with its id and trace."""
    settings = {"VAE_MODELS": str(small_models), "VAE_PORT": "0", "VAE_LOG_FORMAT": "json", "VAE_ACCESS_LOG": "true"}
    settings["VAE_DRAIN_S"] = "0"
    command = [sys.executable, "-m", "service"]
    with subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        url = re.search(r"http://[\d.]+:\d+", lines[0].decode())
        assert url, lines
        headers = {"x-request-id": "seen-1", **PARENT}
        httpx.post(f"{url.group()}/v1/models/mnist-2d/sample", headers=headers, timeout=60).raise_for_status()
        process.send_signal(signal.SIGTERM)
        lines += process.stdout.read().splitlines()
    told = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "message"} <= one.keys() for one in told)
    assert {"service", "service.access", "uvicorn.error"} <= {one["logger"] for one in told}
    (access,) = (one for one in told if one["logger"] == "service.access")
    assert (access["request_id"], access["trace_id"], access["status"]) == ("seen-1", TRACE, 200)
    assert (access["model"], access["operation"], access["outcome"]) == ("mnist-2d", "sample", "ok")
    assert access["duration_ms"] > 0


def test_as_json_a_refusal_is_an_object_too() -> None:
    """What cannot start says so in the form that was set."""
    settings = {"VAE_MODELS": "/nowhere", "VAE_PORT": "0", "VAE_LOG_FORMAT": "json"}
    done = subprocess.run(
        [sys.executable, "-m", "service"], cwd=ROOT, env=settings, capture_output=True, timeout=60, check=False
    )
    told = json.loads(done.stdout)
    assert (done.returncode, told["level"]) == (1, "CRITICAL")
    assert "no model repository /nowhere" in told["message"]
