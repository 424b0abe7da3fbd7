"""Compares the service with other servers (`make bench`). One round starts each in turn, under the same loads."""

from __future__ import annotations

import argparse
import subprocess
import sys
from fnmatch import fnmatch
from http.client import HTTPException
from itertools import product
from pathlib import Path

from benchmarks import arrivals, bodies, closed, models, report
from benchmarks.bodies import Body
from benchmarks.environments import HERE, InstallFailed, ignored_home, prepare
from benchmarks.findings import ALONE, Findings
from benchmarks.measure import Measure
from benchmarks.roster import PEERS, Peer
from benchmarks.servers import Server, StartFailed, end_when_asked
from benchmarks.truth import Truth, WrongAnswer
from benchmarks.workloads import CAPACITY, OPEN, ROWS, WORKLOADS, Workload

WARM_S = 1


def main() -> None:
    """Install, measure, write docs/results/serving.md and .png; complete rounds outlast an interruption."""
    options = parse()
    end_when_asked()
    closed.check()
    home = ignored_home()
    models.write(home / "models")
    raw = home / "serving.json"
    found = Findings.read(raw) if options.resume else Findings(settings={"rounds": 0, "seconds": options.seconds})
    pythons = environments(options.peers, found)
    chosen = [one for one in WORKLOADS if any(fnmatch(one.name, pattern) for pattern in options.workloads)]
    for turn in range(found.settings["rounds"], options.rounds):
        for model in dict.fromkeys(one.model for one in chosen):
            mine = [one for one in chosen if one.model == model]
            alone(home / "models" / model / "1", mine, found)
            # Another order every round, so that nobody is always behind the same neighbour.
            for name in rotated([name for name in pythons if able(name, mine)], turn):
                measure(name, pythons[name], home / "models" / model / "1", mine, found)
        found.settings["rounds"] = turn + 1
        found.write(raw)
        print(f"round {turn + 1} of {options.rounds} is kept; `--resume` continues after it", flush=True)
    report.write(found, raw, options.out)


def parse() -> argparse.Namespace:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=commas, default=list(PEERS), help=", ".join(PEERS))
    parser.add_argument("--workloads", type=commas, default=["*"], help="patterns such as mlp-*-64,conv-binary-*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="of one load")
    parser.add_argument("--resume", action="store_true", help="continue after the rounds that the last run completed")
    parser.add_argument("--out", type=Path, default=Path("docs/results/serving.md"))
    options = parser.parse_args()
    if unknown := set(options.peers) - PEERS.keys():
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return options


def commas(text: str) -> list[str]:
    """Split a comma-separated list."""
    return text.split(",")


def able(name: str, chosen: list[Workload]) -> bool:
    """Whether the peer supports any of the workloads."""
    return any(map(PEERS[name].takes, chosen))


def rotated(names: list[str], turn: int) -> list[str]:
    """Rotate the list, so that each round starts with another server."""
    start = turn * 3 % len(names)
    return names[start:] + names[:start]


def environments(names: list[str], found: Findings) -> dict[str, str]:
    """Python executable of every peer that can be installed; a note on the others."""
    pythons = {}
    for name in names:
        peer = PEERS[name]
        requirements = HERE / "peers" / f"{name}.txt"
        try:
            pythons[name] = (
                prepare(name, requirements, peer.python or sys.executable) if peer.package else sys.executable
            )
        except InstallFailed as error:
            found.note(f"{peer.title}: not installed ({error})")
    return pythons


def measure(name: str, python: str, folder: Path, chosen: list[Workload], found: Findings) -> None:
    """Run one server through its loads; a failure becomes a note."""
    peer, home = PEERS[name], ignored_home()
    command = [python, "-m", f"benchmarks.peers.{peer.program or name}"]
    try:
        server = Server(command, folder, make(peer, "json"), home / f"{name}.log", peer.workers)
    except StartFailed as error:
        found.note(f"{peer.title}: does not start ({error})")
        return
    try:
        found.start_s.setdefault(name, []).append(server.start_s)
        closed.run(server.port, make(peer, "json"), 64, WARM_S)
        capacity: dict[str, float] = {}
        for workload in sound(server, peer, folder, [one for one in chosen if peer.takes(one)], found):
            one = load(server, peer, workload, found.settings["seconds"], capacity)
            found.add(workload.name, name, one)
            print(f"{peer.title:36} {workload.title:32} {one.rate:9.1f}/s {one.p50_ms:8.2f} ms", flush=True)
        found.memory_mib.setdefault(name, []).append(server.memory_mib())
    except (OSError, HTTPException, subprocess.SubprocessError) as error:
        found.note(f"{peer.title}: broke off under load ({error!r:.150})")
    finally:
        server.stop()


def sound(server: Server, peer: Peer, folder: Path, chosen: list[Workload], found: Findings) -> list[Workload]:
    """Workloads for which the server's answers are correct; a note on the others."""
    truth, right = Truth(str(folder)), set()
    for body in dict.fromkeys(one.body for one in chosen):
        try:
            truth.check(server, body, peer.forms[body], bodies.images(ROWS[body]))
            right.add(body)
        except WrongAnswer as error:
            found.note(f"{peer.title}, {folder.parent.name}, {body}: does not count ({error})")
    return [one for one in chosen if one.body in right]


def load(server: Server, peer: Peer, workload: Workload, seconds: int, capacity: dict[str, float]) -> Measure:
    """Run one load; the rate with CAPACITY connections is the reference of open loops."""
    body = make(peer, workload.body)
    if workload.load not in OPEN:
        one = closed.run(server.port, body, int(workload.load), seconds)
        if workload.load == CAPACITY:
            capacity[workload.body] = one.rate
        return one
    if workload.body not in capacity:
        capacity[workload.body] = closed.run(server.port, body, int(CAPACITY), seconds).rate
    return arrivals.run(server.port, body, OPEN[workload.load] * capacity[workload.body], seconds)


def make(peer: Peer, body: str) -> Body:
    """Request in the peer's format."""
    return peer.forms[body].ask(bodies.images(ROWS[body]))


def alone(folder: Path, chosen: list[Workload], found: Findings) -> None:
    """Measure onnxruntime without a server, for bodies of many rows: an upper bound."""
    seconds = found.settings["seconds"]
    for workload, rows in product(chosen, (256, 1024)):
        if workload.body in (f"rows{rows}", f"npy{rows}") and workload.load == "1":
            command = [sys.executable, "-m", "benchmarks.peers.model", str(folder), str(rows), str(seconds)]
            said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds + 60)
            found.add(workload.name, ALONE, Measure(float(said.stdout) / rows))


if __name__ == "__main__":
    main()
