"""The service under attack (`make attack`): is it healthy while callers send hostile requests?

Each attack sends one sort of hostile request from several callers at once, while a process of its own asks for
/health/live and for a small encode, 50 times a second each, on a new connection each time. Latency counts from when a
probe was due.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import multiprocessing
import os
import select
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks import bodies, hostile, pages
from benchmarks.bodies import Body
from benchmarks.environments import ignored_home
from benchmarks.hostile import Hostile
from benchmarks.servers import Server, StartFailed, end_when_asked

P99_MS, WORST_MS = 200.0, 1000.0
"""Limit of the latency of /health/live under attack."""
GROWTH_MIB = 512.0
"""Limit of a worker's memory growth: VAE_MEMORY_BYTES."""
PROBES_S = 50
CALL_S = 35.0
"""A call without an answer after this long is lost."""
QUIET_S = 30.0
"""Time after an attack within which the service must be idle again."""
QUIET_CPU = 0.2
PIECE = 2**16
NICENESS = 10
"""Niceness of the clients: they stand for other machines with processors of their own."""
LOST = "lost"
COMMAND = [sys.executable, "-m", "benchmarks.peers.ours"]
HEALTH = Body("/health/live", {}, b"", "GET")
HEALTHY, ENCODED = frozenset({"200"}), frozenset({"200", "503"})


@dataclass
class Probes:
    """Latencies in milliseconds and outcomes of one kind of probe."""

    latencies: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def percentile(self, percent: float) -> float:
        """Percentile of the latencies in milliseconds; infinite without probes."""
        return float(np.percentile(self.latencies, percent)) if self.latencies else float("inf")


@dataclass
class Found:
    """Effects of one attack."""

    attack: Hostile
    health: Probes
    encode: Probes
    answers: Counter[str]
    growth_mib: float
    ended: int
    """Processes of the service that ended."""
    quiet: bool

    def failures(self) -> list[str]:
        """Missed aims, a few words each."""
        wrong = Counter({said: n for said, n in self.answers.items() if said not in map(str, self.attack.right)})
        p99, worst = self.health.percentile(99), self.health.percentile(100)
        unhealthy = sum(n for said, n in self.health.outcomes.items() if said not in HEALTHY)
        unserved = sum(n for said, n in self.encode.outcomes.items() if said not in ENCODED)
        checks = {
            f"health p99 {p99:.0f} ms": p99 <= P99_MS,
            f"health worst {worst:.0f} ms": worst <= WORST_MS,
            f"{unhealthy} health probes failed": not unhealthy,
            f"{unserved} encodes failed": not unserved,
            f"answers: {told(wrong)}": not wrong,
            f"no answer within {CALL_S:.0f} s": self.answers.total() > 0,
            f"{self.growth_mib:.0f} MiB more": self.growth_mib <= GROWTH_MIB,
            f"{self.ended} processes ended": not self.ended,
            f"still at work after {QUIET_S:.0f} s": self.quiet,
        }
        return [said for said, good in checks.items() if not good]

    def row(self) -> str:
        """Row of the table."""
        health, encode = self.health, self.encode
        times = f"{health.percentile(50):.0f} | {health.percentile(99):.0f} | {health.percentile(100):.0f}"
        verdict = "; ".join(self.failures()) or "holds"
        return (
            f"| {self.attack.name} | {times} | {encode.percentile(99):.0f} | {told(self.answers)} | "
            f"{self.growth_mib:.0f} | {self.ended} | {verdict} |"
        )


HEADINGS = [
    "| attack | health p50, ms | p99 | worst | encode p99, ms | answers | memory, MiB | ended | verdict |",
    "|---|--:|--:|--:|--:|---|--:|--:|---|",
]


def main() -> int:
    """Attack and print the table; the exit status is 1 if an aim is missed."""
    options = parse()
    end_when_asked()
    print("\n".join(HEADINGS), flush=True)
    found: list[Found] = []
    service: Server | None = None
    try:
        for attack in options.chosen:
            service = service or start(options)
            found.append(under(service, attack, options))
            print(found[-1].row(), flush=True)
            if found[-1].ended or not found[-1].quiet:
                service.stop()
                service = None
    finally:
        if service:
            service.stop()
    broken = [one.attack.name for one in found if one.failures()]
    verdict = f"{len(found) - len(broken)} of {len(found)} attacks leave the service as it should be"
    print(f"\n{verdict}")
    if options.out:
        options.out.write_text(page(found, verdict, options))
    return int(bool(broken))


def parse() -> argparse.Namespace:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(prog="make attack", description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one attack")
    parser.add_argument("--attacks", default="*", help="patterns with semicolons between, such as 'JSON*;form*'")
    parser.add_argument("--model", type=Path, default=Path("models/mnist/3"), help="the default model")
    parser.add_argument("--address-space-mib", type=int, default=6144, help="of each process of the service")
    parser.add_argument("--out", type=Path, help="a page such as docs/results/attack.md; none by default")
    options = parser.parse_args()
    patterns = options.attacks.split(";")
    options.chosen = [each for each in hostile.attacks() if any(fnmatch(each.name, pattern) for pattern in patterns)]
    if not options.chosen:
        parser.error(f"no attack is named {options.attacks}; there are " + "; ".join(a.name for a in hostile.attacks()))
    return options


def start(options: argparse.Namespace) -> Server:
    """Start the service with limited memory, so that a successful attack cannot exhaust the machine's.

    Raises: SystemExit where it does not start.
    """
    limited = ["prlimit", f"--as={options.address_space_mib * hostile.MIB}", *COMMAND]
    try:
        server = Server(limited, options.model, encode(), ignored_home() / "attack.log", options.workers)
    except StartFailed as error:
        raise SystemExit(f"the service does not start ({error})") from error
    if not settled(server):
        raise SystemExit("the service does not come to rest before an attack")
    return server


def encode() -> Body:
    """Probe: a small request that is sent during the attack."""
    return bodies.raw("/v1/encode").ask(bodies.images(1))


def under(server: Server, attack: Hostile, options: argparse.Namespace) -> Found:
    """Run one attack, from an idle service until it is idle again."""
    spawn = multiprocessing.get_context("spawn")
    callers, probes = spawn.Pipe(), spawn.Pipe()
    load = (server.port, attack.name, options.callers, options.seconds)
    ours = [
        spawn.Process(target=call, args=(callers[1], *load), daemon=True),
        spawn.Process(target=probe, args=(probes[1], server.port, options.seconds + 1.0), daemon=True),
    ]
    for process in ours:
        process.start()
    try:
        for here, _ in (callers, probes):
            here.recv()  # it has made its bodies
        server.reset_peaks()
        at_rest = server.peaks_mib()
        for here, _ in (probes, callers):
            here.send(None)
        answers: Counter[str] = callers[0].recv()
        health, encoded = probes[0].recv()
    finally:
        for process in ours:
            process.terminate()
            process.join()
    peaks = server.peaks_mib()
    growth = max((peak - at_rest.get(pid, 0.0) for pid, peak in peaks.items()), default=0.0)
    quiet = settled(server)
    return Found(attack, health, encoded, answers, growth, len(at_rest.keys() - server.pids()), quiet)


def settled(server: Server) -> bool:
    """Wait until the service is idle; whether it was in time."""
    end = time.monotonic() + QUIET_S
    while time.monotonic() < end:
        cpu, started = server.cpu_s(), time.monotonic()
        time.sleep(0.25)
        if server.cpu_s() - cpu < QUIET_CPU * (time.monotonic() - started):
            with suppress(OSError, http.client.HTTPException):
                return server.ask(encode())[0] == http.HTTPStatus.OK
    return False


def call(pipe: Connection, port: int, name: str, callers: int, seconds: float) -> None:
    """Process of the clients of one attack; sends the outcomes of their calls."""
    os.nice(NICENESS)
    (attack,) = (each for each in hostile.attacks() if each.name == name)
    wire, outcomes = attack.body().wire(), Counter[str]()
    pipe.send(None)
    pipe.recv()
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=one_caller, args=(port, wire, end, outcomes)) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send(outcomes)
    pipe.recv()


def one_caller(port: int, wire: bytes, end: float, outcomes: Counter[str]) -> None:
    """Send the same request repeatedly, on one connection as long as the service keeps it open."""
    connection: socket.socket | None = None
    while time.monotonic() < end:
        try:
            connection = connection or socket.create_connection(("127.0.0.1", port), timeout=CALL_S)
            status, kept = exchange(connection, wire)
            outcomes[status] += 1
        except (OSError, http.client.HTTPException) as error:
            outcomes[f"{LOST} ({type(error).__name__})"] += 1
            kept = False
        if not kept and connection:
            connection.close()
            connection = None
    if connection:
        connection.close()


def exchange(connection: socket.socket, wire: bytes) -> tuple[str, bool]:
    """Send a request and read its answer; the status, and whether the connection stays open.

    An answer that comes before all is sent ends the sending, as it does for careful clients.
    Raises: OSError, HTTPException.
    """
    view, broken = memoryview(wire), False
    while view and not select.select([connection], [], [], 0)[0]:
        try:
            view = view[connection.send(view[:PIECE]) :]
        except (BrokenPipeError, ConnectionResetError):
            broken = True  # what was answered before may still be there
            break
    answer = http.client.HTTPResponse(connection)
    try:
        answer.begin()
        answer.read()
        return str(answer.status), not (answer.will_close or view or broken)
    finally:
        answer.close()


def probe(pipe: Connection, port: int, seconds: float) -> None:
    """Process that probes health and encode at fixed times, and sends the outcomes."""
    pipe.send(None)
    pipe.recv()
    pipe.send(asyncio.run(probes(port, seconds)))
    pipe.recv()


async def probes(port: int, seconds: float) -> tuple[Probes, Probes]:
    """Alternate both kinds of probe, each sent when it is due, whatever the earlier ones did."""
    sorts = (HEALTH, Probes()), (encode(), Probes())
    loop = asyncio.get_running_loop()
    started, tasks = loop.time(), []
    for number in range(int(2 * PROBES_S * seconds)):
        body, found = sorts[number % 2]
        due = started + number / (2 * PROBES_S)
        await asyncio.sleep(due - loop.time())
        tasks.append(asyncio.create_task(one_probe(port, body, due, found)))
    await asyncio.gather(*tasks)
    return sorts[0][1], sorts[1][1]


async def one_probe(port: int, body: Body, due: float, found: Probes) -> None:
    """Send one probe; a lost one counts with the time at which it was abandoned."""
    wire = body._replace(headers={**body.headers, "connection": "close"}).wire()
    try:
        async with asyncio.timeout(CALL_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(wire)
                answer = await reader.read()
            finally:
                writer.close()
        outcome = answer[9:12].decode("latin-1") or LOST
    except (OSError, TimeoutError):
        outcome = LOST
    found.outcomes[outcome] += 1
    found.latencies.append((asyncio.get_running_loop().time() - due) * 1e3)


def told(outcomes: Counter[str]) -> str:
    """Outcomes with their counts, the most frequent first."""
    return ", ".join(f"{count:,} x {said}" for said, count in outcomes.most_common()) or "none"


def page(found: list[Found], verdict: str, options: argparse.Namespace) -> str:
    """Page with the results."""
    setting = (
        f"{options.callers} callers send one sort of hostile request for {options.seconds:g} s each, to a service with "
        f"{options.workers} workers and the shipped models. Meanwhile `/health/live` and a small encode are asked for "
        f"{PROBES_S} times a second each, on new connections. Aims: health p99 at most {P99_MS:.0f} ms and worst at "
        f"most {WORST_MS:.0f} ms; every hostile request answered by a status that fits; no process ends; a worker's "
        f"memory grows by at most {GROWTH_MIB:.0f} MiB; at rest again within {QUIET_S:.0f} s. {pages.machine()}, "
        "shared by service, callers (at lower priority) and probes. `make attack OUT=docs/results/attack.md` makes "
        "this page."
    )
    rows = [one.row() for one in found]
    return "\n".join(["# The service under attack", "", setting, "", f"**{verdict}.**", "", *HEADINGS, *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
