"""A caller that hangs up while its request waits costs nothing more."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from service.repository.repository import Repository
from service.runtime.jobs import PROBE_AFTER_S
from service.settings import Settings
from tests.faults.conftest import eventually

LEAVERS, ROWS = 10, 8


def outcomes(client: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = next(family for family in families if family.name == "vae_requests").samples
    totals = [s for s in samples if s.name.endswith("_total") and s.labels["operation"] == "decode"]
    return {sample.labels["outcome"]: sample.value for sample in totals}


def queued(client: httpx.Client) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    (sample,) = next(family for family in families if family.name == "vae_queued_rows").samples
    return sample.value


HEADS = {
    "v1": b"/v1/decode HTTP/1.1\r\ncontent-type: application/octet-stream",
    "v2": b"/v2/models/digits.decode/infer HTTP/1.1\r\ninference-header-content-length: 0",
    "diffusers": b"/diffusers/digits/decode?shape=8&shape=8&dtype=float32&output_type=pt HTTP/1.1",
}
"""A request of each face for the same rows."""


@pytest.mark.parametrize("face", HEADS)
def test_requests_of_callers_that_left_are_dropped(
    face: str,
    slow: Callable[[Callable[[], object]], Repository],
    serve: Callable[[FastAPI], AbstractContextManager[str]],
) -> None:
    """Behind a batch, ten callers hang up; their rows are not computed, and the next caller is served."""
    head = b"POST %b\r\nhost: localhost\r\n" % HEADS[face]
    body = bytes(ROWS * 8 * 4)
    request = head + b"content-length: %d\r\n\r\n" % len(body) + body
    entered, gate = threading.Event(), threading.Event()
    app = create_app(Settings(max_rows=8), slow(lambda: (entered.set(), gate.wait(20))))
    with serve(app) as url, httpx.Client(base_url=url) as client:
        address = (client.base_url.host, client.base_url.port or 80)
        with socket.create_connection(address) as busy:
            busy.sendall(request)
            assert entered.wait(20)
            leavers = [socket.create_connection(address) for _ in range(LEAVERS)]
            for leaver in leavers:
                leaver.sendall(request)
            eventually(lambda: queued(client) == ROWS * LEAVERS)
            for leaver in leavers:
                leaver.close()
            time.sleep(2 * PROBE_AFTER_S)
            gate.set()
            assert client.post("/v1/decode", json={"latents": [[0.0] * 8]}).status_code == 200
            assert busy.recv(64).startswith(b"HTTP/1.1 200")
        assert outcomes(client) == {"ok": 2, "caller_gone": LEAVERS}
