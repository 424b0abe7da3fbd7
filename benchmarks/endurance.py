"""The service under a long, mixed load (`make endurance`): memory over time, idle CPU, every answer counted."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import bodies, mixture, models, pages
from benchmarks.environments import ignored_home
from benchmarks.mixture import Mixture
from benchmarks.servers import Server, end_when_asked

REST_S, IDLE_S = 2.0, 20.0
SAMPLE_S = 5.0
SETTLED_S = 60.0
COMMAND = [sys.executable, "-m", "benchmarks.peers.ours"]


@dataclass
class Endurance:
    """What one run found: shares of a core without load, and (seconds under load, MiB resident)."""

    minutes: float
    idle_before: float = 0.0
    idle_after: float = 0.0
    memory: list[tuple[float, float]] = field(default_factory=list)

    def deviation(self) -> float | None:
        """The largest, as a share of what memory was after the first minute; None of a run that was shorter."""
        settled = [mib for moment, mib in self.memory if moment >= SETTLED_S]
        return max(abs(mib / settled[0] - 1.0) for mib in settled) if settled and settled[0] else None


def main() -> int:
    """Measure, write docs/results/endurance.md and .png; 1 where a call ended otherwise than it should."""
    options = parse()
    end_when_asked()
    home = ignored_home()
    models.write(home / "models")
    found, probe = Endurance(options.minutes), bodies.json("/v1/reconstruct").ask(bodies.images(1))
    server = Server(COMMAND, home / "models" / "mlp" / "1", probe, home / "endurance.log")
    try:
        load = Mixture(server.port)
        found.idle_before = idle(server)
        asyncio.run(under_load(server, load, found))
        found.idle_after = idle(server)
    finally:
        server.stop()
    raw = home / "endurance.json"
    raw.write_text(json.dumps(asdict(found) | {"outcomes": load.outcomes}))
    pages.write(page(found, load, options.out.with_suffix(".png").name), options.out, "endurance", raw)
    return 1 if load.wrong() else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="under load; the rest takes another")
    parser.add_argument("--out", type=Path, default=Path("docs/results/endurance.md"))
    return parser.parse_args()


def idle(server: Server) -> float:
    """The share of a core it takes when nobody calls, after a little rest."""
    time.sleep(REST_S)
    started, taken = time.perf_counter(), server.cpu_s()
    time.sleep(IDLE_S)
    return (server.cpu_s() - taken) / (time.perf_counter() - started)


async def under_load(server: Server, load: Mixture, found: Endurance) -> None:
    """Put the load on it, and write down its memory meanwhile."""
    watch = asyncio.create_task(weigh(server, found.memory))
    await load.run(60.0 * found.minutes)
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch


async def weigh(server: Server, memory: list[tuple[float, float]]) -> None:
    """Its resident memory every five seconds, for ever."""
    started = time.perf_counter()
    while True:
        memory.append((time.perf_counter() - started, await asyncio.to_thread(server.resident_mib)))
        await asyncio.sleep(SAMPLE_S)


def page(found: Endurance, load: Mixture, plot: str) -> str:
    """The whole page."""
    parts = [
        "# The service under a long, mixed load",
        setting(found),
        f"![Memory over time]({plot})",
        figures(found),
        "## What became of the calls",
        load.summary(),
        load.table(),
    ]
    return "\n\n".join(parts) + "\n"


def setting(found: Endurance) -> str:
    """Machine and load."""
    return (
        f"{pages.machine()}, shared by server and callers. One worker, one thread for onnxruntime, the two models of "
        f"the benchmark; {mixture.CALLERS} callers, {mixture.RATE:g} requests a second between them, for "
        f"{found.minutes:g} minutes. `make endurance` makes this page."
    )


def figures(found: Endurance) -> str:
    """Memory and idle processor time."""
    first, last, most = found.memory[0][1], found.memory[-1][1], max(mib for _, mib in found.memory)
    deviation = found.deviation()
    lines = [
        "| | |",
        "|---|--:|",
        f"| resident memory: first, last, most | {first:.0f}, {last:.0f}, {most:.0f} MiB |",
        f"| largest deviation after the first minute | {'-' if deviation is None else f'{deviation:.1%}'} |",
        f"| idle, share of a core, before any load | {found.idle_before:.2%} |",
        f"| idle, share of a core, after the load | {found.idle_after:.2%} |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
