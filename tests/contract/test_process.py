"""The service as a process: start, refusal to start, stop."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

StartService = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
ROOT = Path(__file__).parent.parent.parent
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("VAE_")}


def refused(*flags: str, **settings: str) -> str:
    """Message of `python -m service` when it cannot start."""
    done = subprocess.run(
        [sys.executable, "-m", "service", *flags], cwd=ROOT, env={**CLEAN, "VAE_PORT": "0", **settings},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stdout == ""
    return done.stderr


def test_it_serves_and_stops_in_good_order(start_service: StartService, digits_models: Path) -> None:
    """It prints its URL and a command that works; SIGTERM ends it with 0."""
    with start_service(VAE_MODELS=str(digits_models), VAE_DRAIN_S="0") as (process, url):
        assert process.stdout is not None
        line = process.stdout.readline()
        command = re.search(r"curl .*", line)
        assert command
        assert f"{url}/v1/sample" in command.group()
        sample = httpx.post(f"{url}/v1/sample?count=16&seed=7", headers={"accept": "image/png"}, timeout=30)
        assert sample.content.startswith(b"\x89PNG")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"VAE_MODELS": "/nowhere"}, "no model repository /nowhere"),
        ({"VAE_MODLES": "x"}, "did you mean VAE_MODELS?"),
        ({"VAE_EXECUTION_PROVIDER": "cuda"}, "this onnxruntime offers"),
        ({"VAE_MAX_ROWS": "many"}, "VAE_MAX_ROWS"),
    ],
)
def test_what_it_cannot_start_with_is_one_clear_line(settings: dict[str, str], says: str) -> None:
    """A failed start prints one line, no traceback, and exits with another status than 0."""
    line = refused(**settings)
    assert says in line
    assert line.count("\n") == 1


def test_a_taken_port_is_one_clear_line(digits_models: Path) -> None:
    """A taken port is reported before any model is opened."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(VAE_MODELS=str(digits_models), VAE_PORT=str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in line
    assert line.count("\n") == 1


def test_a_misspelt_flag_is_refused() -> None:
    """The message names the misspelt flag."""
    assert "--prot" in refused("--prot", "1")


FAULTS = """
import resource, sys
import numpy as np
from service import process
process.fix_mmap_threshold()
before = 0
for turn in range(110):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [np.ones(200_000, np.float32) for _ in range(4)]  # 0.8 MB each
    del kept
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 100)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_of_a_request_is_used_again() -> None:
    """Blocks below 2 MiB do not come as fresh pages for every request: 3.2 MB would be 780 page faults each time."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert float(done.stdout) < 50.0
