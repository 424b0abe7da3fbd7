"""The memory of one large request."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx

from tests.faults.conftest import workers_of

ROWS, ROW_BYTES = 16384, 28 * 28 * 4
FEW_BATCHES = 24 * 2**20


def peak_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return 1024 * int(found[1])


def test_a_large_request_needs_its_body_and_a_few_batches(
    start_service: Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]],
) -> None:
    """16,384 images through a shipped model: 49 MiB in, 49 MiB out, and the answer is never in memory as a whole."""
    with start_service(VAE_VERSIONS="mnist-2d:1") as (process, url), httpx.Client(base_url=url, timeout=120) as client:
        headers = {"content-type": "application/octet-stream"}
        assert client.post("/v1/reconstruct", content=bytes(1024 * ROW_BYTES), headers=headers).status_code == 200
        (worker,) = workers_of(process.pid)
        before, received = peak_bytes(worker), 0
        with client.stream("POST", "/v1/reconstruct", content=bytes(ROWS * ROW_BYTES), headers=headers) as answer:
            assert answer.status_code == 200
            for chunk in answer.iter_bytes():
                received += len(chunk)
        assert received == ROWS * ROW_BYTES
        assert peak_bytes(worker) - before < ROWS * ROW_BYTES + FEW_BATCHES
