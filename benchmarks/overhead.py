"""What a request costs beside the model: `make bench-overhead`, an identity graph beside a bare ASGI function.

Every round starts both servers and puts each load on one and then on the other; which comes first alternates. Judged is
the processor time of a request with 64 connections, which other work on the machine disturbs less than its rate, and
the median latency of one connection. A sampling profiler in the service's own process then says where the time goes.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from types import FrameType
from typing import NamedTuple

import torch
import uvicorn
from torch import Tensor, nn

from benchmarks import bodies, closed, pages
from benchmarks.bodies import Body, Form
from benchmarks.environments import ignored_home
from benchmarks.servers import Server, end_when_asked
from service.app import create_app
from service.server.worker import server_config
from service.settings import Settings
from training.export.pair import export_vae

NAME, SHAPE = "identity", (1, 28, 28)
CONNECTIONS = 64
FORMS: dict[str, tuple[Form, float | None]] = {
    "binary": (bodies.raw("/v1/reconstruct"), 2.2),
    "JSON": (bodies.json("/v1/reconstruct"), 3.5),
    "/v2, binary": (bodies.oip_binary(f"/v2/models/{NAME}.reconstruct/infer", "images", "images"), None),
    "/v2, JSON": (bodies.oip(f"/v2/models/{NAME}.reconstruct/infer", "images"), None),
}
"""Formats, each with the ratio to the bare function that is asked for."""
ASKED_P50 = 1.8
SERVERS = {name: [sys.executable, "-m", f"benchmarks.peers.{name}"] for name in ("ours", "echo")}
PERIOD_S = 0.001
PARTS = {
    "onnxruntime/": "onnxruntime, an identity",
    "service/runtime/": "batching",
    "service/operations/": "the operation",
    "service/codecs/": "reading and writing the format",
    "service/api/validation.py": "checks of rows and options",
    "service/api/memory.py": "the memory budget",
    "service/api/": "the request between them",
    "service/repository/": "the request between them",
    "service/security/": "access control",
    "service/observability/": "request ids, metrics",
    "service/server/protocol.py": "HTTP: limits, head, socket write",
    "service/server/": "routing and middleware",
    "uvicorn/": "HTTP: uvicorn and its parser",
    "fastapi/": "routing and middleware",
    "starlette/": "routing and middleware",
    "orjson/": "reading and writing the format",
}
"""Parts of a request by the file of the innermost function; the first that matches counts."""
LOOP = "the event loop, socket read"


class Identity(nn.Module):
    """Encoder and decoder of a model that does nothing: the latent is the image."""

    def __init__(self, *, encodes: bool) -> None:
        super().__init__()
        self.encodes = encodes

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 28, 28) -> (n, 2, 28, 28), mean and log_var; or (n, 1, 28, 28) -> the same."""
        return torch.cat([x, torch.zeros_like(x)], 1) if self.encodes else x


class Cost(NamedTuple):
    """Processor time of a request with 64 connections, in microseconds, and one connection's median latency in ms."""

    cpu_us: float
    p50_ms: float


def main() -> None:
    """Measure and write docs/results/overhead.md."""
    options = parse()
    end_when_asked()
    closed.check()
    folder = write(ignored_home() / "overhead")
    found: dict[str, dict[str, list[Cost]]] = {form: defaultdict(list) for form in FORMS}
    for turn in range(options.rounds):
        for form, name, cost in measured(folder, turn, options.seconds):
            found[form][name].append(cost)
            print(f"round {turn + 1} of {options.rounds}  {form:12} {name:5} {cost.cpu_us:7.1f} us", flush=True)
    shares = {form: profiled(folder, asked(form), options.seconds) for form in ("binary", "JSON")}
    options.out.write_text(page(found, shares, options))
    print(options.out.read_text())


def parse() -> argparse.Namespace:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--out", type=Path, default=Path("docs/results/overhead.md"))
    return parser.parse_args()


def write(models: Path) -> Path:
    """Write the identity as a version; return its folder."""
    x = torch.from_numpy(bodies.images(4))
    return export_vae(Identity(encodes=True), Identity(encodes=False), x, models, NAME, replace=True)


def asked(form: str) -> Body:
    """A request with one image."""
    return FORMS[form][0].ask(bodies.images(1))


def measured(folder: Path, turn: int, seconds: float) -> Iterator[tuple[str, str, Cost]]:
    """One round: each load on both servers, in alternating order."""
    home = ignored_home()
    with ExitStack() as stack:
        servers = {}
        for name, command in SERVERS.items():
            servers[name] = Server(command, folder, asked("binary"), home / f"{name}.log")
            stack.callback(servers[name].stop)
        for form in FORMS:
            for name in sorted(servers, reverse=bool(turn % 2)):
                yield form, name, cost(servers[name], asked(form), seconds)


def cost(server: Server, body: Body, seconds: float) -> Cost:
    """Put both loads on a server.

    Raises:
        SystemExit: An answer was not 200.
    """
    closed.run(server.port, body, CONNECTIONS, 1)
    before = server.cpu_s()
    many = closed.run(server.port, body, CONNECTIONS, seconds)
    used = server.cpu_s() - before
    one = closed.run(server.port, body, 1, seconds / 2)
    if many.failures + one.failures:
        raise SystemExit(f"{many.failures + one.failures} answers of {body.path} were not 200")
    return Cost(used * 1e6 / (many.rate * max(1, round(seconds))), one.p50_ms)


def profiled(folder: Path, body: Body, seconds: float) -> Counter[str]:
    """Samples of the part of a request that runs, every millisecond of processor time, with 64 connections."""
    settings = Settings(models=str(folder.parents[1]), default_model=NAME, threads=1, access_log=False)
    app = create_app(settings)
    config = server_config(settings, app, app.respond, host="127.0.0.1", port=0)
    samples: Counter[str] = Counter()

    async def serve() -> None:
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110  # uvicorn has no event for it
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        await asyncio.to_thread(closed.run, port, body, CONNECTIONS, 1)
        with sampling(samples):
            await asyncio.to_thread(closed.run, port, body, CONNECTIONS, seconds)
        server.should_exit = True
        await task

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(serve())
    return samples


@contextmanager
def sampling(samples: Counter[str]) -> Iterator[None]:
    """Count the part of a request in which the main thread is, at every tick of its processor time."""

    def tick(_: int, frame: FrameType | None) -> None:
        samples[part_of(frame)] += 1

    signal.signal(signal.SIGPROF, tick)
    signal.setitimer(signal.ITIMER_PROF, PERIOD_S, PERIOD_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def part_of(frame: FrameType | None) -> str:
    """The part that a function belongs to: that of its own file, or of the nearest caller of which one is known."""
    while frame is not None:
        file = frame.f_code.co_filename
        for path, part in PARTS.items():
            if path in file:
                return part
        frame = frame.f_back
    return LOOP


def page(found: dict[str, dict[str, list[Cost]]], shares: dict[str, Counter[str]], options: argparse.Namespace) -> str:
    """Page with the results."""
    setting = (
        "The model is an identity graph, so what is measured is all that a request costs beside the model: HTTP, "
        "checks, batching, the call of onnxruntime, the answer. Beside it is an ASGI function on uvicorn that reads "
        f"a body and answers with the same bytes. A request has one 28 x 28 image. {options.rounds} rounds of "
        f"{options.seconds:g} s a load; every round starts both servers anew. One worker, one thread for onnxruntime; "
        f"{pages.machine()}, shared with the load. `make bench-overhead` makes this page."
    )
    beside = (
        f"Processor time of a request in microseconds with {CONNECTIONS} connections, and one connection's median "
        "latency in milliseconds, each as service / bare; the ratios are medians of the rounds' ratios."
    )
    where = (
        "Microseconds of a request, from samples of the running function at every millisecond of processor time; C "
        "functions count with the Python function that calls them."
    )
    lines = [
        *["## Beside a bare ASGI function", "", beside, ""],
        "| format | processor time | ratio | asked, at most | latency | ratio | asked, at most |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(row(form, list(zip(found[form]["ours"], found[form]["echo"], strict=True))) for form in FORMS),
        *["", "## Where the time goes", "", where, "", f"| part | {' | '.join(shares)} |", "|---|--:|--:|"],
    ]
    total = {form: median(one.cpu_us for one in found[form]["ours"]) for form in shares}
    for part in sorted(set().union(*shares.values()), key=lambda part: -sum(one[part] for one in shares.values())):
        figures = [f"{total[form] * one[part] / one.total():.1f}" for form, one in shares.items()]
        lines.append(f"| {part} | {' | '.join(figures)} |")
    return "\n".join(["# What a request costs beside the model", "", setting, "", *lines, ""])


def row(form: str, pairs: list[tuple[Cost, Cost]]) -> str:
    """Row of the first table, from a format's costs on both servers in every round."""
    limit = FORMS[form][1]
    cells = [form]
    for field, digits, asked_for in zip(Cost._fields, (0, 2), (limit, limit and ASKED_P50), strict=True):
        ours, bare = (median(getattr(cost, field) for cost in costs) for costs in zip(*pairs, strict=True))
        ratio = median(getattr(mine, field) / getattr(other, field) for mine, other in pairs)
        cells += [f"{ours:.{digits}f} / {bare:.{digits}f}", f"**{ratio:.2f}**", str(asked_for or "-")]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
