"""Latency of reconstruct with and without refined requests at the same time: `make bench-beside`."""

from __future__ import annotations

import argparse
import http.client
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import arrivals, bodies, closed, pages
from benchmarks.bodies import Body
from benchmarks.environments import ignored_home
from benchmarks.measure import Measure
from benchmarks.servers import Server, end_when_asked

CONNECTIONS = 16
CALLERS = 4
"""Each sends its next refined request after the answer to the last."""
COMMAND = [sys.executable, "-m", "benchmarks.peers.ours"]


@dataclass(frozen=True)
class Round:
    """Latencies at half capacity, alone and while refined requests run, and how many of those were answered."""

    alone: Measure
    beside: Measure
    refined: int


def main() -> int:
    """Measure and write the page; the exit status is 1 if a short request failed."""
    options = parse()
    closed.check()
    end_when_asked()
    one = bodies.images(1)
    short, long = bodies.raw("/v1/reconstruct").ask(one), bodies.raw("/v1/denoise?quality=refined&level=0.25").ask(one)
    server = Server(COMMAND, options.model, short, ignored_home() / "beside.log")
    try:
        capacity = closed.run(server.port, short, CONNECTIONS, options.seconds).rate
        rounds = [measured(server, short, long, capacity / 2, options.seconds) for _ in range(options.rounds)]
    finally:
        server.stop()
    options.out.write_text(page(options.model, capacity, rounds))
    print(options.out.read_text())
    return int(any(found.alone.failures + found.beside.failures for found in rounds))


def parse() -> argparse.Namespace:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/mnist/3"), help="a version that can refine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each load")
    parser.add_argument("--out", type=Path, default=Path("docs/results/beside.md"))
    return parser.parse_args()


def measured(server: Server, short: Body, long: Body, rate: float, seconds: float) -> Round:
    """Measure both in turn, so that other load on the machine affects both alike."""
    alone = arrivals.run(server.port, short, rate, seconds)
    with steadily(server, long) as answers:
        beside = arrivals.run(server.port, short, rate, seconds)
    return Round(alone, beside, len(answers))


@contextmanager
def steadily(server: Server, body: Body) -> Iterator[list[int]]:
    """Send refined requests from `CALLERS` clients until cancelled; collects the statuses."""
    stop, answers = threading.Event(), list[int]()

    def call() -> None:
        while not stop.is_set():
            try:
                status, _ = server.ask(body)
            except (OSError, http.client.HTTPException):
                continue
            answers.append(status)

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    try:
        yield answers
    finally:
        stop.set()
        for caller in callers:
            caller.join()


def page(model: Path, capacity: float, rounds: list[Round]) -> str:
    """Page with the results."""
    rows = [
        f"| {found.alone.p50_ms:.2f} | {found.alone.p99_ms:.2f} | {found.beside.p50_ms:.2f} | "
        f"{found.beside.p99_ms:.2f} | {found.beside.p99_ms / found.alone.p99_ms:.2f} | {found.refined} |"
        for found in rounds
    ]
    ratio = median(found.beside.p99_ms / found.alone.p99_ms for found in rounds)
    setting = (
        f"`reconstruct` of one image (raw float32) by `{model.parent.name}` {model.name} at half the capacity of "
        f"{capacity:,.0f} requests a second, arriving by a Poisson process; without and with {CALLERS} callers who "
        "send one refined denoise after the other. Latencies in milliseconds, from when a request was due. One worker, "
        f"one thread for onnxruntime; {pages.machine()}, shared by server and callers. `make bench-beside` makes this "
        "page."
    )
    lines = [
        f"**The 99th percentile beside refined requests is {ratio:.2f} times that without**, the median of the rounds.",
        "",
        "| p50 alone | p99 alone | p50 beside | p99 beside | ratio of p99 | refined requests answered |",
        "|--:|--:|--:|--:|--:|--:|",
        *rows,
    ]
    return "\n".join(["# Short work beside long work", "", setting, "", *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
