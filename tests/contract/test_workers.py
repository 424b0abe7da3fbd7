"""Several worker processes on one port."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service.security.rates import CHECK_INTERVAL_S
from tests.faults.conftest import eventually, workers_of

REQUESTS = 40


def served(one: httpx.Client) -> bool:
    try:
        return one.post("/v1/sample").status_code == 200
    except httpx.TransportError:
        return False


def counted(one: httpx.Client) -> float:
    """Number of answered requests, summed over the workers."""
    families = text_string_to_metric_families(one.get("/metrics").text)
    samples = [s for family in families if family.name == "vae_requests" for s in family.samples]
    return sum(s.value for s in samples if s.labels["outcome"] == "ok")


def versions(one: httpx.Client) -> set[str]:
    """Versions that the workers answer with."""
    return {one.post("/v1/sample").headers["x-model-version"] for _ in range(REQUESTS)}


def followed(one: httpx.Client, order: str) -> bool:
    """Load or unload; whether both workers are done when the call is answered."""
    answer = one.post(f"/v1/models/mnist-2d/{order}")
    assert answer.status_code in (200, 202), answer.text
    return (answer.json()["workers"], answer.json()["followed"]) == (2, 2)


def test_a_killed_worker_is_replaced_orders_are_followed_and_metrics_summed(
    start_service: Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]],
    flat_models: Path,
    brighter: Callable[..., Path],
) -> None:
    """Two workers share the port and what they are told to serve; after one is killed the other serves, a new one comes
    that knows what was ordered, and nothing is forgotten.
    """  # noqa: D205  # one promise
    settings = {
        "VAE_MODELS": str(flat_models),
        "VAE_WORKERS": "2",
        "VAE_VERSIONS": "latest",
        "VAE_MODEL_CONTROL": "anonymous",
        "VAE_DRAIN_S": "0",
    }
    each_its_own = httpx.Limits(max_keepalive_connections=0)  # so that every worker gets some
    with (
        start_service(**settings) as (process, url),
        httpx.Client(base_url=url, limits=each_its_own, timeout=60) as one,
    ):
        eventually(lambda: served(one))
        eventually(lambda: len(workers_of(process.pid)) == 2)
        brighter(flat_models, "2")
        eventually(lambda: followed(one, "load"))  # from when both are there
        assert versions(one) == {"2"}
        assert followed(one, "versions/2/unload")
        assert versions(one) == {"1"}
        eventually(lambda: counted(one) >= 2 * REQUESTS)  # figures are a tenth of a second on their way
        first, other = workers_of(process.pid)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: len(set(workers_of(process.pid)) - {first}) == 2)
        assert other in workers_of(process.pid)
        eventually(lambda: served(one))
        assert counted(one) >= 2 * REQUESTS
        eventually(lambda: followed(one, "versions/1/load"))
        os.kill(other, signal.SIGSTOP)  # so that the new one answers
        assert versions(one) == {"1"}
        os.kill(other, signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_workers_count_callers_together(
    start_service: Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]],
    flat_models: Path,
    tmp_path: Path,
) -> None:
    """The rates of a key and of an address hold for all workers together, also after one is killed."""
    keys = tmp_path / "keys"
    keys.write_text("alice alice-0123456789abcdef infer rate=10/day\n")
    settings = {"VAE_MODELS": str(flat_models), "VAE_WORKERS": "2", "VAE_API_KEYS": str(keys)}
    each_its_own = httpx.Limits(max_keepalive_connections=0)
    key = {"authorization": "Bearer alice-0123456789abcdef"}
    with (
        start_service(**settings, VAE_OPEN_RATE="10/day", VAE_DRAIN_S="0") as (process, url),
        httpx.Client(base_url=url, limits=each_its_own, timeout=60) as one,
    ):
        eventually(lambda: len(workers_of(process.pid)) == 2)
        eventually(lambda: one.get("/health/ready").status_code == 200)
        time.sleep(2 * CHECK_INTERVAL_S)  # by then each worker knows the other
        for path, headers in (("/v1/models", key), ("/metrics", {})):
            statuses = [one.get(path, headers=headers).status_code for _ in range(REQUESTS)]
            assert statuses.count(200) == 10
            assert statuses.count(429) == REQUESTS - 10
        first = workers_of(process.pid)[0]
        os.kill(first, signal.SIGKILL)
        eventually(lambda: len(set(workers_of(process.pid)) - {first}) == 2)
        eventually(lambda: one.get("/health/ready").status_code == 200)
        time.sleep(2 * CHECK_INTERVAL_S)
        assert {one.get("/v1/models", headers=key).status_code for _ in range(REQUESTS)} == {429}
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
