"""Faults in several real processes on one port, and in one that is starting."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.faults.conftest import (
    LIMIT_S,
    ROOT,
    Outcome,
    Service,
    answers,
    eventually,
    keep_asking,
    wire,
    workers_of,
)
from training.evaluation.served import started

CALLERS = 8
REQUEST = wire("/v1/sample?count=4&seed=7")


async def killed_under_load(service: Service) -> tuple[list[Outcome], list[int]]:
    """Outcomes while a worker is killed and replaced, and the workers at first."""
    stop = asyncio.Event()
    load = [asyncio.create_task(keep_asking(service.port, REQUEST, stop)) for _ in range(CALLERS)]
    await asyncio.sleep(0.5)
    first, other = workers_of(service.process.pid)
    os.kill(first, signal.SIGKILL)
    await asyncio.to_thread(eventually, lambda: len(set(workers_of(service.process.pid)) - {first}) == 2, 60.0)
    await asyncio.sleep(0.5)
    stop.set()
    return [outcome for found in await asyncio.gather(*load) for outcome in found], [first, other]


def test_a_worker_killed_under_load_costs_what_it_had_in_hand(small_models: Path) -> None:
    """A killed worker costs at most one request a client; the other serves, a new one starts, counts stay."""
    with started(VAE_MODELS=str(small_models), VAE_WORKERS="2", VAE_THREADS="1", VAE_DRAIN_S="0") as (process, url):
        service = Service(process, url, small_models)
        eventually(lambda: len(workers_of(process.pid)) == 2 and answers(url), 60.0)
        outcomes, (first, other) = asyncio.run(killed_under_load(service))
        good = [outcome for outcome in outcomes if outcome.status == 200]
        assert len({outcome.content for outcome in good}) == 1
        assert len(outcomes) - len(good) <= CALLERS
        assert {outcome.status for outcome in outcomes} <= {200, 0, -1}
        assert other in workers_of(process.pid)
        assert first not in workers_of(process.pid)
        eventually(lambda: answers(url))
        # Figures are a tenth of a second on their way, and those of the killed one's last tenth are lost with it.
        eventually(lambda: service.metric("vae_requests_total") >= 0.5 * len(good))
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0


def test_sigterm_while_it_starts_ends_it_at_once() -> None:
    """SIGTERM during the start ends the service with 0."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VAE_")}
    with subprocess.Popen(
        [sys.executable, "-m", "service"], cwd=ROOT, env={**clean, "VAE_PORT": "0"}, stdout=subprocess.PIPE
    ) as process:
        eventually(lambda: catches(process.pid, signal.SIGTERM))
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b""


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)
