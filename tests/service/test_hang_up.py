"""A caller that hangs up while its request waits costs nothing more."""

from __future__ import annotations

import socket
import time

import httpx
from prometheus_client.parser import text_string_to_metric_families


def outcomes(client: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = next(family for family in families if family.name == "vae_requests").samples
    totals = [s for s in samples if s.name.endswith("_total") and s.labels["operation"] == "decode"]
    return {sample.labels["outcome"]: sample.value for sample in totals}


def test_requests_of_callers_that_left_are_dropped(client: httpx.Client) -> None:
    """Behind a large request, thirty callers hang up; their rows are not computed, and the next caller is served."""
    address = (client.base_url.host, client.base_url.port or 80)
    large = b"\0" * (16384 * 8 * 4)
    head = "POST /v1/decode HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\ncontent-length: {}\r\n\r\n"
    with socket.create_connection(address) as busy:
        busy.sendall(head.format(len(large)).encode() + large)
        time.sleep(0.02)
        # 512 rows each: enough to be still waiting when their callers have gone.
        leavers = [socket.create_connection(address) for _ in range(30)]
        body = b"\0" * (512 * 8 * 4)
        for leaver in leavers:
            leaver.sendall(head.format(len(body)).encode() + body)
        for leaver in leavers:
            leaver.close()
        assert client.post("/v1/decode", json={"latents": [[0.0] * 8]}).status_code == 200
        assert busy.recv(64).startswith(b"HTTP/1.1 200")
    assert outcomes(client).get("caller_gone", 0) > 0
