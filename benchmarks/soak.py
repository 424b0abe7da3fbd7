"""Runs the service under a long, mixed load (`make soak`): checks memory, threads, descriptors, tasks, answers."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import httpx
import torch

from benchmarks import bodies, mixture, models, pages
from benchmarks.environments import ignored_home
from benchmarks.mixture import Mixture
from benchmarks.servers import Server, end_when_asked
from service.contract.manifest import FILE_NAME
from service.settings import Settings

REST_S, IDLE_S = 5.0, 20.0
SAMPLE_S = 5.0
RELOAD_S = 15.0
WARM_UP = 0.05
"""Share of the time before the first measurement at rest, for every kind of call to occur."""
FLAT = 0.05
"""Limit of the growth of memory at rest. Under load memory varies with hostile bodies."""
COMMAND = [sys.executable, "-m", "benchmarks.peers.ours"]
RELOADS = "model_control" in Settings.model_fields
"""Whether this service supports loading and unloading."""


class Rest(NamedTuple):
    """Resources at rest: more of them after the load than before is a leak."""

    threads: int
    descriptors: int
    tasks: int
    requests: int
    """Counted by the service itself so far."""
    cpu: float
    """The share of a core that it takes."""
    memory_mib: float
    """Resident, what its processes share counted once."""


@dataclass
class Soak:
    """Measurements of one run; memory is (seconds under load, MiB resident)."""

    minutes: float
    reloads: int = 0
    before: Rest | None = None
    after: Rest | None = None
    memory: list[tuple[float, float]] = field(default_factory=list)


def main() -> int:
    """Measure, write docs/results/soak.md and .png; the exit status is 1 if anything is unexpected."""
    options = parse()
    end_when_asked()
    home = ignored_home()
    write_models(home / "soak-models")
    found, probe = Soak(options.minutes), bodies.json("/v1/reconstruct")
    os.environ |= {"VAE_MODEL_CONTROL": "anonymous"} if RELOADS else {}
    server = Server(COMMAND, home / "soak-models" / "mlp" / "1", probe.ask(bodies.images(1)), home / "soak.log")
    try:
        load, warm_up = Mixture(server.port), Mixture(server.port)
        asyncio.run(warm_up.once())
        asyncio.run(under_load(server, warm_up, Soak(0.0), 60.0 * options.minutes * WARM_UP))
        found.before = at_rest(server)
        asyncio.run(under_load(server, load, found, 60.0 * options.minutes))
        found.after = at_rest(server)
    finally:
        server.stop()
    raw = home / "soak.json"
    rests = {"before": found.before._asdict(), "after": found.after._asdict()}
    raw.write_text(json.dumps(asdict(found) | rests | {"outcomes": load.outcomes}))
    failures = wrongs(found, load)
    pages.write(page(found, load, failures, options.out.with_suffix(".png").name), options.out, "soak", raw)
    print("\n".join(failures) or "as it should be")
    return 1 if failures else 0


def parse() -> argparse.Namespace:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="under load; the rest takes two more")
    parser.add_argument("--out", type=Path, default=Path("docs/results/soak.md"))
    return parser.parse_args()


def write_models(repository: Path) -> None:
    """Write the benchmark's models, and a second version of one to be loaded and unloaded."""
    torch.set_num_threads(1)  # on cores that have other work, its threads wait for each other
    models.write(repository)
    shutil.copytree(repository / "conv" / "1", repository / "conv" / "2", dirs_exist_ok=True)
    manifest = repository / "conv" / "2" / FILE_NAME
    manifest.write_text(manifest.read_text().replace('"version": "1"', '"version": "2"'))


def at_rest(server: Server) -> Rest:
    """Measure the resources at rest, after a pause and a reload, at which the service returns freed memory."""
    time.sleep(REST_S)
    for order in ("unload", "load") if RELOADS else ():
        url = f"http://127.0.0.1:{server.port}/v1/models/conv/versions/2/{order}"
        httpx.post(url, headers={"connection": "close"}, timeout=60.0).raise_for_status()
    started, taken = time.perf_counter(), server.cpu_s()
    time.sleep(IDLE_S)
    cpu = (server.cpu_s() - taken) / (time.perf_counter() - started)
    text = httpx.get(f"http://127.0.0.1:{server.port}/metrics", headers={"connection": "close"}).text
    time.sleep(0.5)  # until that connection is closed
    tasks, requests = (total(text, name) for name in ("vae_tasks", "vae_requests_total"))
    return Rest(server.threads(), server.descriptors(), tasks, requests, cpu, server.memory_mib())


def total(metrics: str, name: str) -> int:
    """Sum of a metric over its labels."""
    return int(sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE))))


async def under_load(server: Server, load: Mixture, found: Soak, seconds: float) -> None:
    """Run the load, and record the memory."""
    beside = [asyncio.create_task(weigh(server, found.memory)), asyncio.create_task(reload(server, found))]
    await load.run(seconds)
    for task in beside:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def weigh(server: Server, memory: list[tuple[float, float]]) -> None:
    """Record the resident memory every five seconds, until cancelled."""
    started = time.perf_counter()
    while True:
        memory.append((time.perf_counter() - started, await asyncio.to_thread(server.memory_mib)))
        await asyncio.sleep(SAMPLE_S)


async def reload(server: Server, found: Soak) -> None:
    """Unload and load the second version, until cancelled; requests use the first one."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=60.0) as client:
        while RELOADS:
            await asyncio.sleep(RELOAD_S)
            for order in ("unload", "load"):
                (await client.post(f"/v1/models/conv/versions/2/{order}")).raise_for_status()
            found.reloads += 1


def wrongs(found: Soak, load: Mixture) -> list[str]:
    """Unexpected results, one line each."""
    before, after = found.before, found.after
    assert before is not None
    assert after is not None
    most = max(mib for _, mib in found.memory)
    counted, answered = after.requests - before.requests, load.counted()
    checks = {
        f"{load.wrong():,} calls ended otherwise than they should": load.wrong() == 0,
        f"the service counts {counted:,} requests, callers {answered:,} answers and {load.hung_up():,} hang-ups": (
            answered <= counted <= answered + load.hung_up()
        ),
        f"memory at rest grew from {before.memory_mib:.0f} to {after.memory_mib:.0f} MiB, more than {FLAT:.0%}": (
            after.memory_mib <= (1.0 + FLAT) * before.memory_mib
        ),
        f"memory under load reached {most:.0f} MiB, more than VAE_MEMORY_BYTES above {before.memory_mib:.0f}": (
            most <= before.memory_mib + Settings.model_fields["memory_bytes"].default / 2**20
        ),
        f"threads: {before.threads} before, {after.threads} after": after.threads <= before.threads,
        f"descriptors: {before.descriptors} before, {after.descriptors} after": (
            after.descriptors <= before.descriptors
        ),
        f"tasks: {before.tasks} before, {after.tasks} after": after.tasks <= before.tasks,
    }
    return [said for said, good in checks.items() if not good]


def page(found: Soak, load: Mixture, failures: list[str], plot: str) -> str:
    """Text of the page."""
    parts = [
        "# The service under a long, mixed load",
        setting(found),
        "\n".join(f"- **{failure}**" for failure in failures) or "Everything was as it should be.",
        f"![Memory over time]({plot})",
        figures(found),
        "## What became of the calls",
        load.summary(),
        load.table(),
    ]
    return "\n\n".join(parts) + "\n"


def setting(found: Soak) -> str:
    """Paragraph on the machine and the load."""
    reloads = f"; a version unloaded and loaded again {found.reloads} times" if found.reloads else ""
    return (
        f"{pages.machine()}, shared by server and callers. One worker, one thread for onnxruntime, the two models of "
        f"the benchmark; {mixture.CALLERS} callers, {mixture.RATE:g} requests a second between them, of which "
        f"{mixture.HOSTILE:.0%} are hostile, for {found.minutes:g} minutes{reloads}. `make soak` makes this page."
    )


def figures(found: Soak) -> str:
    """Table of the resources before and after the load."""
    memory = [mib for _, mib in found.memory]
    lines = [
        "| | |",
        "|---|--:|",
        f"| memory under load, MiB: median, most | {median(memory):.0f}, {max(memory):.0f} |",
    ]
    assert found.before is not None
    assert found.after is not None
    for name, before, after in zip(Rest._fields, found.before, found.after, strict=True):
        if name == "cpu":
            lines.append(f"| idle, share of a core, before and after | {before:.2%}, {after:.2%} |")
        elif name == "memory_mib":
            lines.append(f"| memory at rest, MiB, before and after | {before:.0f}, {after:.0f} |")
        elif name != "requests":
            lines.append(f"| {name} at rest, before and after | {before}, {after} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
