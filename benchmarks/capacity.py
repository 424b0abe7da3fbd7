"""How many replicas a load needs: `plan` computes it, `measure` (`make bench-capacity`) checks it on this machine.

    python -m benchmarks.capacity plan --rate 5000 --p99-ms 50
    python -m benchmarks.capacity plan --rate 5000 --p99-ms 50 --setup-us 700 --row-us 60 --max-rows 64

`measure` takes the seconds of a batch from the processor time of one replica at several numbers of connections, and
what an idle time adds from lone requests at several distances. Then it puts other loads on 1, 2 and 4 replicas, and
compares what `queueing` predicts with what is measured. Replicas are bound to one core each, as with a CPU limit of
one. The client has the cores that are left; where none is, its processor time is accounted for.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import httpx
import numpy as np
import torch

from benchmarks import arrivals, bodies, closed, models, pages
from benchmarks.environments import ignored_home
from benchmarks.measure import Measure
from benchmarks.queueing import Floats, Load, OverloadError, Replica, rate_within, replicas_for, sharing, throughput
from benchmarks.servers import Server, end_when_asked

RESULT = Path("docs/results/capacity.md")
MODELS = ("mlp", "conv")
REPLICAS = (1, 2, 4)
CONNECTIONS = 32
"""Of each replica, where throughput is measured."""
CALIBRATION = (1, 4, 16, 64)
"""Numbers of connections at which the seconds of a batch are measured; at 1 also a lone request without idle time."""
IDLE_S = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Idle times after which the time of a lone request is measured, about."""
LOADS = (0.3, 0.5, 0.7)
"""Shares of the predicted throughput at which latency is measured."""
RATE_ERROR, P50_ERROR = 0.15, 0.25
BATCHES = 1.5
"""Mean rows of a batch below which a model counts as one that gains nothing by batches."""
SPINNING_S = 1.0
SPIN = (
    f"import resource, time; end = time.monotonic() + {SPINNING_S}\n"
    "while time.monotonic() < end: pass\n"
    "used = resource.getrusage(resource.RUSAGE_SELF); print((used.ru_utime + used.ru_stime) / max(1, used.ru_nivcsw))"
)
"""A program that keeps a core busy, and tells how long it has had it at a time."""
NODES, NODE_CORES, NODE_REPLICAS = 100, 32, 30
BODY = bodies.raw("/v1/reconstruct").ask(bodies.images(1))


@dataclass(frozen=True)
class Point:
    """A load: what was predicted of it, and what was measured.

    Attributes:
        model: Name of the model.
        replicas: Number of replicas.
        rate: Requests a second that were offered; 0 is as many as CONNECTIONS a replica can send.
        predicted_rate: Predicted requests a second.
        predicted_p50_ms: Predicted median latency; 0 is none.
        predicted_p99_ms: Predicted 99th percentile of latency.
        measured: What was measured.
    """

    model: str
    replicas: int
    rate: float
    predicted_rate: float
    predicted_p50_ms: float
    predicted_p99_ms: float
    measured: Measure

    @property
    def error(self) -> float:
        """Relative error of the prediction: of the rate of a closed load, of the median latency of an open one."""
        if not self.rate:
            return self.predicted_rate / self.measured.rate - 1.0 if self.measured.rate else math.inf
        return self.predicted_p50_ms / self.measured.served_p50_ms - 1.0 if self.measured.served_p50_ms else math.inf

    @property
    def holds(self) -> bool:
        """Whether it is within the limit."""
        return abs(self.error) <= (P50_ERROR if self.rate else RATE_ERROR)


@dataclass
class Capacity:
    """Findings of one run.

    Attributes:
        seconds: Duration of a load.
        cores: Cores of the machine.
        others: Its load average before: how many cores other work took.
        slice_s: Seconds that the system gives a busy process before another one's turn.
        replicas: Measured times by model.
        client_s: Processor seconds of the open loop's client for each request, by model.
        points: Every load.
    """

    seconds: float
    cores: int
    others: float
    slice_s: float
    replicas: dict[str, Replica] = field(default_factory=dict)
    client_s: dict[str, float] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)


def main() -> int:
    """Run a command; the exit status is 1 where a prediction misses its limit or no number of replicas is enough."""
    options = parser().parse_args()
    return options.run(options)


def parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__.partition("\n")[0])
    commands = found.add_subparsers(required=True)
    one = commands.add_parser("plan", help="how many replicas a rate needs")
    one.add_argument("--rate", type=float, required=True, help="requests a second of all replicas")
    one.add_argument("--p99-ms", type=float, required=True, help="limit for 99 of 100 requests, in milliseconds")
    one.add_argument("--model", default="mlp", help=f"whose measured times to use, of {RESULT.with_suffix('.json')}")
    one.add_argument("--setup-us", type=float, help="microseconds of a batch beside its requests; replaces --model")
    one.add_argument("--row-us", type=float, help="microseconds of each request")
    one.add_argument("--max-rows", type=int, default=1, help="most requests of a batch")
    one.add_argument("--path-us", type=float, default=0.0, help="microseconds of network and balancer")
    one.add_argument("--cold-us", type=float, default=0.0, help="microseconds that a batch after an idle time adds")
    one.add_argument("--cool-us", type=float, default=4000.0, help="time constant of that idle time")
    one.add_argument("--cores", type=int, default=1, help="cores of a node, for the number of nodes")
    one.set_defaults(run=plan)
    one = commands.add_parser("measure", help="measure, compare, write the page")
    one.add_argument("--seconds", type=float, default=6.0, help="of one load")
    one.add_argument("--models", default=",".join(MODELS), help="with commas between")
    one.add_argument("--out", type=Path, default=RESULT)
    one.set_defaults(run=measure)
    return found


def plan(options: argparse.Namespace) -> int:
    """Print how many replicas a rate needs."""
    try:
        replica = replica_of(options)
        number = replicas_for(replica, options.rate, options.p99_ms / 1e3)
        load = Load(replica, options.rate / number)
    except OverloadError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{number} replicas of one core, on {math.ceil(number / options.cores)} nodes; add one, so that one may restart"
    )
    print(
        f"each: {load.rate:,.0f} requests/s, {load.rate / replica.capacity:.0%} of its capacity; "
        f"{load.rows:.1f} rows a batch, {load.queued:.1f} rows wait"
    )
    print(f"50 of 100 within {1e3 * load.percentile_s(50.0):.1f} ms, 99 within {1e3 * load.percentile_s(99.0):.1f} ms")
    return 0


def replica_of(options: argparse.Namespace) -> Replica:
    """The replica that the options describe.

    Raises:
        SystemExit: They do not.
    """
    if options.row_us is not None:
        times = (options.setup_us or 0.0) / 1e6, options.row_us / 1e6
        return Replica(
            *times, options.max_rows, *(us / 1e6 for us in (options.path_us, options.cold_us, options.cool_us))
        )
    if options.setup_us is not None:
        raise SystemExit("--setup-us needs --row-us")
    path = Path(__file__).parents[1] / RESULT.with_suffix(".json")
    if not path.exists():
        raise SystemExit(f"no measured times at {path}; run `make bench-capacity`, or give --row-us")
    known = json.loads(path.read_text())["replicas"]
    if options.model not in known:
        raise SystemExit(f"no model {options.model} among {', '.join(known)}; give --row-us for another")
    return Replica(**known[options.model])


def measure(options: argparse.Namespace) -> int:
    """Measure, write the page, its figures as JSON and its plot."""
    closed.check()
    end_when_asked()
    if not (ignored_home() / "models").exists():  # their weights are random, so those of an earlier run will do
        torch.set_num_threads(1)  # on cores that have other work, its threads wait for each other
        models.write(ignored_home() / "models")
    cores = os.sched_getaffinity(0)
    found = Capacity(options.seconds, len(cores), os.getloadavg()[0], slice_s(min(cores)))
    for model in options.models.split(","):
        with served(model, 1) as (server,):
            found.replicas[model], found.client_s[model] = calibrated(server, options.seconds / 2)
        print(f"{model}: {found.replicas[model]}", flush=True)
        for number in REPLICAS:
            with served(model, number) as servers:
                for point in compared(model, servers, found):
                    found.points.append(point)
                    print(line_of(point), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    raw = options.out.with_suffix(".json")
    raw.write_text(json.dumps(asdict(found), indent=1) + "\n")
    pages.write(page(found, options.out.with_suffix(".png").name), options.out, "capacity", raw)
    return int(not all(point.holds for point in found.points))


@contextmanager
def served(model: str, number: int) -> Iterator[list[Server]]:
    """Start replicas with one worker each, bound to the cores in turn, and end them with the block.

    Within the block this process has the cores that are left, or all where none is.
    """
    home, cores = ignored_home(), sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, cores[number:] or cores)
        servers = []
        for k in range(number):
            command = [
                "taskset",
                "--cpu-list",
                str(cores[k % len(cores)]),
                sys.executable,
                "-m",
                "benchmarks.peers.ours",
            ]
            server = Server(command, home / "models" / model / "1", BODY, home / f"capacity-{k}.log")
            stack.callback(server.stop)
            closed.run(server.port, BODY, 16, 1)
            servers.append(server)
        yield servers


class Counted:
    """What a replica and its client used since the last question."""

    def __init__(self, server: Server) -> None:
        self._server, self._last = server, np.zeros(5)
        self.since()

    def since(self) -> dict[str, float]:
        """Processor seconds of replica and client, requests, rows and batches."""
        text = httpx.get(f"http://127.0.0.1:{self._server.port}/metrics").text
        names = ("vae_requests_total", "vae_batch_rows_sum", "vae_batch_rows_count")
        counts = [sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))) for name in names]
        now = np.array([self._server.cpu_s(), client_cpu_s(), *counts])
        found, self._last = now - self._last, now
        return dict(zip(("cpu_s", "client_s", "requests", "rows", "batches"), found.tolist(), strict=True))

    def largest(self) -> int:
        """Upper bound of the rows of a batch so far, from the histogram."""
        text = httpx.get(f"http://127.0.0.1:{self._server.port}/metrics").text
        buckets: dict[float, float] = {}
        for limit, count in re.findall(r'^vae_batch_rows_bucket{.*le="([^"]+)".*} (\S+)$', text, re.MULTILINE):
            buckets[float(limit)] = buckets.get(float(limit), 0.0) + float(count)
        return int(min(limit for limit, count in buckets.items() if count == max(buckets.values())))


def client_cpu_s() -> float:
    """Processor seconds of this process and of those that it started and that have ended."""
    uses = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(use.ru_utime + use.ru_stime for use in uses)


def slice_s(core: int) -> float:
    """Seconds that the system gives a busy process before the turn of another one on its core."""
    command = ["taskset", "--cpu-list", str(core), sys.executable, "-c", SPIN]
    spinning = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return float(np.mean([float(one.communicate()[0]) for one in spinning]))


def calibrated(server: Server, seconds: float) -> tuple[Replica, float]:
    """The seconds of a replica, and the processor seconds of the open loop's client for each request.

    Those of a batch come by least squares from the processor time of batches of different sizes.
    """
    counted, rows, costs, lone_s = Counted(server), [], [], 0.0
    for connections in CALIBRATION:
        counted.since()
        one = closed.run(server.port, BODY, connections, seconds)
        used = counted.since()
        rows.append(used["rows"] / used["batches"])
        costs.append(used["cpu_s"] / used["batches"])
        if connections == 1:
            lone_s = one.p50_ms / 1e3
    if max(rows) < BATCHES:
        replica = Replica(0.0, costs[-1] / rows[-1], 1)
    else:  # weighted so that relative errors count
        weights = 1.0 / np.array(costs)
        matrix = np.stack([np.ones(len(rows)), rows], axis=1) * weights[:, None]
        setup_s, row_s = np.linalg.lstsq(matrix, np.array(costs) * weights, rcond=None)[0]
        replica = Replica(max(0.0, float(setup_s)), float(row_s), counted.largest())
    warm_s, cold_s, cool_s, client_s = cooling(server, lone_s, seconds)
    return replace(replica, path_s=warm_s - replica.batch_s(1), cold_s=cold_s, cool_s=cool_s), client_s


def cooling(server: Server, lone_s: float, seconds: float) -> tuple[float, float, float, float]:
    """Lone requests after idle times: seconds without one, what a long one adds, its time constant; client's seconds.

    Args:
        server: The replica.
        lone_s: Seconds of a lone request without idle time before it.
        seconds: Duration of the requests at one distance.
    """
    idle_s, took_s, client_s = [0.0], [lone_s], 0.0
    for wanted_s in IDLE_S:
        period_s, before = lone_s + wanted_s, client_cpu_s()
        one = arrivals.run(server.port, BODY, 1.0 / period_s, seconds, even=True)
        client_s = client_s or (client_cpu_s() - before) * period_s / seconds
        took_s.append(one.served_p50_ms / 1e3)
        idle_s.append(max(0.0, period_s - took_s[-1]))
    return (*fitted(np.array(idle_s), np.array(took_s)), client_s)


def fitted(idle_s: Floats, took_s: Floats) -> tuple[float, float, float]:
    """Fit `took = warm + cold (1 - exp(-idle / cool))` by least squares of relative errors: warm, cold and cool.

    `cool` is at most half of the longest idle time: with a longer one, `cold` would be far beyond all measured times.
    """
    best = (math.inf, float(took_s[0]), 0.0, 1.0)
    for cool_s in np.geomspace(idle_s[idle_s > 0.0].min() / 3.0, idle_s.max() / 2.0, 200):
        matrix = np.stack([np.ones(len(idle_s)), 1.0 - np.exp(-idle_s / cool_s)], axis=1) / took_s[:, None]
        (warm_s, cold_s), *_ = np.linalg.lstsq(matrix, np.ones(len(idle_s)), rcond=None)
        error = float(((matrix @ (warm_s, cold_s) - 1.0) ** 2).sum())
        if cold_s >= 0.0:
            best = min(best, (error, float(warm_s), float(cold_s), float(cool_s)))
    return best[1:]


def compared(model: str, servers: Sequence[Server], found: Capacity) -> Iterator[Point]:
    """Loads of some replicas: as much as they can, then shares of what is predicted."""
    replica, number, ports = found.replicas[model], len(servers), [server.port for server in servers]
    # Batches of a closed load are as large as the connections allow.
    busy = replace(replica, max_rows=min(replica.max_rows, CONNECTIONS))
    before = client_cpu_s()
    with ThreadPoolExecutor(number) as pool:
        parts = list(pool.map(lambda port: closed.run(port, BODY, CONNECTIONS, found.seconds), ports))
    whole = Measure(
        sum(part.rate for part in parts),
        float(np.median([part.p50_ms for part in parts])),
        max(part.p99_ms for part in parts),
        sum(part.failures for part in parts),
    )
    client_s = (client_cpu_s() - before) / max(1.0, whole.rate * found.seconds)
    most = throughput(busy, number, found.cores, client_s, found.slice_s)
    yield Point(model, number, 0.0, most, 0.0, 0.0, whole)
    for share in LOADS:
        rate = share * throughput(busy, number, found.cores, found.client_s[model], found.slice_s)
        before = client_cpu_s()
        one = arrivals.run(ports, BODY, rate, found.seconds)
        client_s_of_it = (client_cpu_s() - before) / (rate * found.seconds)
        yield Point(model, number, rate, rate, *predicted(replica, rate, number, found.cores, client_s_of_it), one)


def predicted(replica: Replica, rate: float, number: int, cores: int, client_s: float) -> tuple[float, float]:
    """Predicted median and 99th percentile in milliseconds; infinite where the cores cannot serve the rate."""
    try:
        load = Load(sharing(replica, rate, number, cores, client_s), rate / number)
    except OverloadError:
        return math.inf, math.inf
    return 1e3 * load.percentile_s(50.0), 1e3 * load.percentile_s(99.0)


def line_of(point: Point) -> str:
    """A row of the page's table."""
    measured, verdict = point.measured, f"{point.error:+.0%}{'' if point.holds else ' (misses)'}"
    if not point.rate:
        return (
            f"| {point.model} | {point.replicas} | all they can | {point.predicted_rate:,.0f} | "
            f"{measured.rate:,.0f} | "
            f"{verdict} | | {measured.p50_ms:.1f} | | | {measured.p99_ms:.1f} |"
        )
    return (
        f"| {point.model} | {point.replicas} | {point.rate:,.0f} | | {measured.rate:,.0f} | {verdict} | "
        f"{point.predicted_p50_ms:.2f} | {measured.served_p50_ms:.2f} | {measured.p50_ms:.2f} | "
        f"{point.predicted_p99_ms:.1f} | {measured.served_p99_ms:.1f} |"
    )


HEAD = (
    "| model | replicas | offered | rate, predicted | measured | error | p50, predicted | measured | with the client "
    "| p99, predicted | measured |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)
BATCH_S = (
    "From the processor time of one replica. `path` is what a lone request takes beside it; it is below zero where "
    "the replica still works after its answer. `cold` is what a request after a long idle time takes longer, and "
    "`cool` the time constant: after an idle time t it is cold (1 - exp(-t / cool))."
)
LOADED = (
    "Loads for 1, 2 and 4 replicas, from none of which the times above were taken. `all they can` is a closed loop "
    f"with {CONNECTIONS} connections a replica; the others arrive by a Poisson process and go to a replica at random. "
    "The error is that of the rate for the former, that of the median latency for the latter. Latency is the server's: "
    "from when a request was sent to when the kernel received the answer. `with the client` is the median from when it "
    "was due to when the client read the answer. Rates are requests a second, latencies milliseconds."
)
ASSUMED = (
    f"Nothing of this was measured: {NODES} nodes of {NODE_CORES} cores like this one run {NODE_REPLICAS} replicas "
    "each, and leave the other cores to the system. Assumptions: replicas share nothing, so that n do n times the work "
    "of one (memory bandwidth, caches, and the clock speed of a full node are not in the model); a balancer spreads "
    "requests at random and adds nothing to `path`; neither it nor the network is a bottleneck; the rate does not vary "
    "within seconds."
)
BALANCER = (
    "At such rates the balancers are a cluster of their own: one that passes on 50,000 requests a second a core needs "
    "a core for every 50,000. When a node is lost, the others take its share, 1 % more each; the rates above leave no "
    "room for more."
)


def page(found: Capacity, plot: str) -> str:
    """Text of the page."""
    parts = [
        "# Capacity: predicted and measured",
        setting(found),
        f"![Predicted and measured latency]({plot})",
        summary(found),
        "## Seconds of a batch",
        BATCH_S,
        table_of_replicas(found),
        "## Predictions",
        LOADED,
        "\n".join([HEAD, *map(line_of, found.points)]),
        f"## {NODES} nodes, on paper",
        ASSUMED,
        on_paper(found),
        BALANCER,
    ]
    return "\n\n".join(parts) + "\n"


def setting(found: Capacity) -> str:
    """Paragraph on the machine and the loads."""
    return (
        f"{pages.machine()}, shared by replicas and client; load average before: {found.others:.1f}. Loads of "
        f"{found.seconds:g} s. Replicas of one worker and one thread are bound to the cores in turn, so with "
        f"{found.cores} cores, 4 replicas are beyond the cores; a busy process has a core for "
        f"{1e3 * found.slice_s:.1f} ms before another one's turn. The models are those of [serving](serving.md); a "
        "request has one image as raw float32. `make bench-capacity` makes this page. The model behind it, and how to "
        "plan with it: [capacity](../capacity.md)."
    )


def summary(found: Capacity) -> str:
    """How many predictions hold."""
    lines = []
    for name, limit, points in (
        ("throughput", RATE_ERROR, [point for point in found.points if not point.rate]),
        ("median latency", P50_ERROR, [point for point in found.points if point.rate]),
    ):
        held = sum(point.holds for point in points)
        lines.append(f"- Predicted {name} within {limit:.0%} of the measured one: {held} of {len(points)} loads.")
    return "\n".join(lines)


def table_of_replicas(found: Capacity) -> str:
    """Table of the calibrated replicas."""
    lines = [
        "| model | a batch, us | each request, us | rows at most | path, us | cold, us | cool, us | most requests/s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {model} | {1e6 * one.setup_s:,.0f} | {1e6 * one.row_s:,.0f} | {one.max_rows} | {1e6 * one.path_s:,.0f} | "
        f"{1e6 * one.cold_s:,.0f} | {1e6 * one.cool_s:,.0f} | {one.capacity:,.0f} |"
        for model, one in found.replicas.items()
    ]
    return "\n".join(lines)


def on_paper(found: Capacity) -> str:
    """Table of a cluster that nobody has measured."""
    lines = [
        "| model | limit for 99 of 100, ms | requests/s | of capacity | received, Gbit/s a node |",
        "|---|--:|--:|--:|--:|",
    ]
    for model, replica in found.replicas.items():
        for limit_ms in (2 * math.ceil(1e3 * replica.lone_s), 50, 200):
            rate = rate_within(replica, limit_ms / 1e3)
            bits = 8 * len(BODY.wire()) * rate * NODE_REPLICAS
            lines.append(
                f"| {model} | {limit_ms} | {NODES * NODE_REPLICAS * rate:,.0f} | {rate / replica.capacity:.0%} | "
                f"{bits / 1e9:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
