"""A process that opens an endless version stops on SIGTERM and leaves no process behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

StartService = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
Hanging = Callable[[Path, str], None]
ROOT = Path(__file__).parents[2]
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("VAE_")}
PATIENT = {"VAE_LOAD_LIMIT_S": "3600", "VAE_TIMEOUT_S": "1", "VAE_DRAIN_S": "0"}


def trials(folder: Path) -> list[int]:
    """Processes that try a version below `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes()
            if b"service.repository.trial" in words and str(folder).encode() in words:
                found.append(int(path.parent.name))
    return found


def eventually(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextmanager
def starting(models: Path, port: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A service that is about to open `models`, at its first version's check."""
    settings = {**CLEAN, **PATIENT, "VAE_PORT": str(port), "VAE_MODELS": str(models)}
    with subprocess.Popen([sys.executable, "-m", "service"], cwd=ROOT, env=settings) as process:
        try:
            eventually(lambda: bool(trials(models)))
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("when", ["opened", "run"])
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_start_that_hangs_can_be_ended(flat_models: Path, hanging: Hanging, when: str, end: signal.Signals) -> None:
    """SIGTERM ends a hanging start with 0, and the hanging process ends too."""
    hanging(flat_models / "mnist-2d" / "1", when)
    with starting(flat_models) as process:
        process.send_signal(end)
        assert process.wait(30) == (0 if end is signal.SIGTERM else -end)
        eventually(lambda: not trials(flat_models))


def test_nobody_is_let_in_before_the_models_are_open(flat_models: Path, hanging: Hanging) -> None:
    """Connections are refused until the models are open, so that a balancer tries another replica."""
    hanging(flat_models / "mnist-2d" / "1", "opened")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with starting(flat_models, port), socket.socket() as caller:
        assert caller.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_service_ends_while_a_load_hangs(
    start_service: StartService, flat_models: Path, hanging: Hanging, workers: str
) -> None:
    """Requests are answered during a hanging load, and SIGTERM ends the service within its grace."""
    settings = {**PATIENT, "VAE_MODEL_CONTROL": "anonymous", "VAE_WORKERS": workers, "VAE_MODELS": str(flat_models)}
    settings["VAE_VERSIONS"] = "mnist-2d:1"  # a worker that starts late opens the same
    with start_service(**settings) as (process, url):
        second = flat_models / "mnist-2d" / "2"
        shutil.copytree(flat_models / "mnist-2d" / "1", second)
        manifest = second / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"version": "1"', '"version": "2"'))
        hanging(second, "opened")

        def load() -> None:
            with suppress(httpx.HTTPError):
                httpx.post(f"{url}/v1/models/mnist-2d/versions/2/load", timeout=120)

        loading = threading.Thread(target=load)
        loading.start()
        eventually(lambda: bool(trials(second)))
        assert httpx.post(f"{url}/v1/sample?count=1", timeout=30).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        loading.join()
        eventually(lambda: not trials(flat_models))
