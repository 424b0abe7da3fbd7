"""The service as a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("VAE_")}


@contextmanager
def running(**settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`python -m service` with settings; gives the process and its URL, and ends it whatever happens."""
    environment = {**CLEAN, "VAE_PORT": "0", **settings}
    process = subprocess.Popen(
        [sys.executable, "-m", "service"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
        assert found, process.communicate(timeout=10)
        yield process, found.group()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too, which hold its pipes
        process.communicate()


@pytest.fixture
def start_service() -> Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]:
    """A function that starts `python -m service` with the settings it is given, for a `with` block."""
    return running
