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

REQUESTS = 40


def workers_of(pid: int) -> list[int]:
    """Children of the process that serve; multiprocessing's resource tracker is none."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"resource_tracker" not in Path(f"/proc/{c}/cmdline").read_bytes()]


def eventually(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def served(url: str) -> bool:
    try:
        return httpx.post(f"{url}/v1/sample", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def counted(url: str) -> float:
    """Requests answered, summed over the workers."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = [s for family in families if family.name == "vae_requests" for s in family.samples]
    return sum(s.value for s in samples if s.labels["outcome"] == "ok")


def test_a_killed_worker_is_replaced_and_metrics_are_summed(
    start_service: Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]], digits_models: Path
) -> None:
    """Two workers share the port; after one is killed the other serves, a new one comes, and nothing is forgotten."""
    with start_service(VAE_MODELS=str(digits_models), VAE_WORKERS="2") as (process, url):
        eventually(lambda: served(url))
        eventually(lambda: len(workers_of(process.pid)) == 2)
        for _ in range(REQUESTS):
            assert served(url)
        eventually(lambda: counted(url) >= REQUESTS)  # figures are a tenth of a second on their way
        first, other = workers_of(process.pid)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: len(set(workers_of(process.pid)) - {first}) == 2)
        assert other in workers_of(process.pid)
        eventually(lambda: served(url))
        assert counted(url) >= REQUESTS
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
