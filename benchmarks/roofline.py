"""The roofline of one core: `make bench-roofline`.

What the core can do at most (operations in float32 and int8, bytes a second from its caches and from memory) is
measured; what a row of a model needs is counted in its ONNX graphs; the seconds of onnxruntime alone and of the service
are measured beside them, in the same run and in alternating order.

Source: Williams, Waterman and Patterson (2009), "Roofline: an insightful visual performance model".
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks import bodies, models, pages
from benchmarks.arithmetic import Layer, layers, total
from benchmarks.bodies import Body
from benchmarks.denoisers import CHANNELS, Denoiser
from benchmarks.environments import ignored_home
from benchmarks.overhead import SERVERS
from benchmarks.peers.model import Model, session
from benchmarks.photographs import SIDE, noisy, request
from benchmarks.servers import Server, end_when_asked
from service.contract.manifest import Manifest
from service.runtime.session import PROVIDERS, Session

BATCHES = (1, 64, 1024)
BLOCK = 64
"""The service's VAE_MAX_ROWS: a larger request is computed in blocks of as many rows."""
PHOTO = Path("models/photo/1")
GEMM = (512, 1024)
"""Sides of the square matrices whose products are timed."""
CONVOLUTIONS = ((64, 128), (128, 64))
"""Channels and sides of the images of 3 x 3 convolutions that are timed."""
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST_S = 0.03
"""A sample of a peak is the mean of calls that take at least this long together."""
SAMPLES = 5
FEWEST = 3
KINDS = ("float32", "int8")
OPSET, IR = 20, 9
"""Of the graphs that are timed for the roofs: those of the exporter."""
ALONE, BLOCKS, SESSIONS, OURS, ECHO = "alone", "blocks", "sessions", "ours", "echo"
"""What is timed: onnxruntime alone, the same in blocks, in the service's sessions, the service, HTTP alone."""
KIB = 2**10
Call = Callable[[], object]


class Peaks(NamedTuple):
    """What one core does at most.

    Attributes:
        operations: Operations a second by kind: what is computed, and how.
        bandwidth: Bytes a second by place: `L2`, `L3`, `memory`.
        sizes: Bytes of the caches by place.
    """

    operations: dict[str, float]
    bandwidth: dict[str, float]
    sizes: dict[str, int]

    def peak(self, kind: str) -> float:
        """Operations a second in `float32` or `int8`."""
        return max(value for name, value in self.operations.items() if name.startswith(kind))

    def place(self, size: float) -> str:
        """The smallest cache that holds as many bytes, or memory."""
        return next((name for name, held in self.sizes.items() if size <= held), "memory")

    def least_s(self, found: list[Layer]) -> tuple[float, float]:
        """Seconds that layers take at least, and the part of them that computing takes.

        A layer takes as long as its operations or its bytes, whichever is longer. Weights come from the smallest cache
        that holds all weights of the graph, activations from the smallest that holds the layer's.
        """
        weights = self.bandwidth[self.place(total(found).weights)]
        seconds = computing = 0.0
        for one in found:
            of_flop = one.flop / self.peak("int8" if one.eight_bits else "float32")
            of_bytes = one.weights / weights + one.activations / self.bandwidth[self.place(one.activations)]
            seconds += max(of_flop, of_bytes)
            computing += of_flop if of_flop >= of_bytes else 0.0
        return seconds, computing


Timer = Callable[[float], float]
"""Calls something repeatedly for a number of seconds; returns the mean seconds of the processor, which other work on
the machine disturbs less than the clock's."""


class Work(NamedTuple):
    """One model at one number of rows.

    Attributes:
        name: Of the model.
        rows: Rows of a call.
        layers: Its layers at that number of rows.
        timers: What is timed, by name.
    """

    name: str
    rows: int
    layers: list[Layer]
    timers: dict[str, Timer]


class Asked:
    """Timer of a request, over one connection, from other cores than the server's."""

    def __init__(self, server: Server, body: Body, cores: set[int]) -> None:
        self._server, self._body, self._cores = server, body, cores

    def __call__(self, seconds: float) -> float:
        """Ask repeatedly.

        Raises:
            SystemExit: An answer is not 200.
        """
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cores)
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60.0)
        try:
            self._ask(connection)
            used = self._server.cpu_s()
            calls = repeated(lambda: self._ask(connection), seconds)
            return (self._server.cpu_s() - used) / calls
        finally:
            connection.close()
            os.sched_setaffinity(0, before)

    def _ask(self, connection: http.client.HTTPConnection) -> None:
        connection.request("POST", self._body.path, self._body.content, self._body.headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{self._body.path} was answered with {answer.status}: {content[:200]!r}")


class Results(NamedTuple):
    """What one run found.

    Attributes:
        peaks: What the core does at most.
        best: Operations or bytes a second of everything that was timed for the roofs.
        works: What was computed.
        spent: Processor seconds of a call, one a round, by `<name> <rows>` and by what was timed.
        loads: Load averages, one a round.
    """

    peaks: Peaks
    best: dict[str, float]
    works: list[Work]
    spent: dict[str, dict[str, list[float]]]
    loads: list[float]

    def processor_s(self, work: Work, name: str) -> float:
        """Median processor seconds of a call."""
        return median(self.spent[f"{work.name} {work.rows}"][name])


def main() -> None:
    """Measure, and write the page with its plot."""
    parser = argparse.ArgumentParser(prog="make bench-roofline", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of all measurements (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each measurement in a round (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/roofline.md"), help="page (%(default)s)")
    options = parser.parse_args()
    end_when_asked()
    cores = os.sched_getaffinity(0)
    core = {max(cores)}
    os.sched_setaffinity(0, core)  # servers inherit it
    home = ignored_home()
    if not (home / "models" / "mlp" / "1" / "manifest.json").exists():
        models.write(home / "models")
    roofs, best, loads = roof_calls(), dict[str, float](), []
    spent: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        works = workloads(home, stack, cores - core or core)
        for turn in range(options.rounds):
            loads.append(os.getloadavg()[0])
            for name, (amount, call) in roofs.items():
                best[name] = max(best.get(name, 0.0), amount / fastest(call))
            for work in works:
                found = spent.setdefault(f"{work.name} {work.rows}", {})
                for name in list(work.timers)[:: -1 if turn % 2 else 1]:
                    found.setdefault(name, []).append(work.timers[name](options.seconds))
            print(f"round {turn + 1} of {options.rounds}", flush=True)
    write(Results(peaks_of(best), best, works, spent, loads), options)


# What is timed


def repeated(call: Call, seconds: float) -> int:
    """Call for so many seconds, three times at least; return how often."""
    calls, end = 0, time.perf_counter() + seconds
    while calls < FEWEST or time.perf_counter() < end:
        call()
        calls += 1
    return calls


def here(call: Call) -> Timer:
    """Timer of a call in this process."""

    def timed(seconds: float) -> float:
        call()
        used = time.process_time()
        calls = repeated(call, seconds)
        return (time.process_time() - used) / calls

    return timed


def fastest(call: Call) -> float:
    """The least processor seconds of a call, of several samples of many calls each."""
    call()
    count = max(1, round(LEAST_S / here(call)(0.0)))
    found = []
    for _ in range(SAMPLES):
        used = time.process_time()
        for _ in range(count):
            call()
        found.append((time.process_time() - used) / count)
    return min(found)


def caches() -> dict[str, int]:
    """Bytes of the second and third cache by name."""
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        level, size = ((folder / name).read_text().strip() for name in ("level", "size"))
        if int(level) > 1:
            found[f"L{level}"] = int(size.rstrip("K")) * KIB
    return found


def roof_calls() -> dict[str, tuple[float, Call]]:
    """What is timed for the roofs: operations or bytes of a call, and the call."""
    rng = np.random.default_rng(0)
    found: dict[str, tuple[float, Call]] = {}
    for side in GEMM:
        for kind in KINDS:
            found[f"{kind}, matrices of {side} x {side}"] = 2.0 * side**3, product_of(rng, side, kind)
    for channels, side in CONVOLUTIONS:
        flop = 2.0 * 9.0 * channels**2 * side**2
        for kind in KINDS:
            found[f"{kind}, 3 x 3 convolution, {channels} channels"] = flop, convolution_of(rng, channels, side, kind)
    sizes = caches()
    for place, part in {**{name: size // 4 for name, size in sizes.items()}, "memory": 4 * max(sizes.values())}.items():
        if place == "L3":
            part //= 2  # the cores share it  # noqa: PLW2901
        a, b, c = (np.ones(part // 4, np.float32) for _ in range(3))
        found[f"{place}, copy"] = 2.0 * part, partial(np.copyto, b, a)
        found[f"{place}, sum of two"] = 3.0 * part, partial(np.add, a, b, out=c)
        found[f"{place}, read"] = 1.0 * part, a.max
    return found


def product_of(rng: np.random.Generator, side: int, kind: str) -> Call:
    """onnxruntime's product of two square matrices."""
    if kind == "int8":
        x = rng.integers(0, 255, (side, side), np.uint8)
        w = rng.integers(-127, 127, (side, side), np.int8)
        nodes, types = [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], (TensorProto.UINT8, TensorProto.INT32)
        return running(nodes, {"w": w}, x, types)
    x, w = (rng.random((side, side), np.float32) for _ in range(2))
    return running([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w}, x, (TensorProto.FLOAT, TensorProto.FLOAT))


def convolution_of(rng: np.random.Generator, channels: int, side: int, kind: str) -> Call:
    """onnxruntime's 3 x 3 convolution of one image."""
    if kind == "int8":
        x = rng.integers(0, 255, (1, channels, side, side), np.uint8)
        one, zero = np.array(0.02, np.float32), np.array(128, np.uint8)
        weights = {
            "w": rng.integers(-127, 127, (channels, channels, 3, 3), np.int8),
            "s": one,
            "z": zero,
            "zw": np.array(0, np.int8),
        }
        read = ["x", "s", "z", "w", "s", "zw", "s", "z"]
        node = helper.make_node("QLinearConv", read, ["y"], pads=[1] * 4)
        return running([node], weights, x, (TensorProto.UINT8, TensorProto.UINT8))
    x = rng.random((1, channels, side, side), np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    weights = {"w": rng.random((channels, channels, 3, 3), np.float32)}
    return running([node], weights, x, (TensorProto.FLOAT, TensorProto.FLOAT))


def running(
    nodes: list[onnx.NodeProto], weights: Mapping[str, NDArray[Any]], x: NDArray[Any], types: tuple[int, int]
) -> Call:
    """A call of a graph from `x` to `y`, in one thread."""
    inputs = [helper.make_tensor_value_info("x", types[0], x.shape)]
    outputs = [helper.make_tensor_value_info("y", types[1], [None] * x.ndim)]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    made = helper.make_graph(nodes, "peak", inputs, outputs, initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    opened = session(model.SerializeToString())
    return lambda: opened.run(None, {"x": x})


def workloads(home: Path, stack: ExitStack, cores: set[int]) -> list[Work]:
    """All work; its servers end with the stack.

    Args:
        home: Folder for logs, with the model `mlp` in its models/.
        stack: What ends the servers.
        cores: Cores of the client.
    """
    folders = {
        "mlp": home / "models" / "mlp" / "1",
        "mnist-2d": Path("models/mnist-2d/1"),
        "mnist": Path("models/mnist/3"),
    }
    probe = bodies.npy("/v1/models/mnist/reconstruct").ask(bodies.images(1))
    included = Server(SERVERS["ours"], folders["mnist"], probe, home / "ours.log")
    stack.callback(included.stop)
    own = Server(SERVERS["ours"], folders["mlp"], asked("mlp", 1), home / "mlp.log")
    stack.callback(own.stop)
    echo = Server(SERVERS["echo"], folders["mlp"], asked("mlp", 1), home / "echo.log")
    stack.callback(echo.stop)
    works = []
    for name, folder in folders.items():
        for rows in BATCHES:
            body = asked(name, rows)
            ours = Asked(own if name == "mlp" else included, body, cores)
            works.append(reconstruction(name, folder, rows, ours, Asked(echo, body, cores)))
    for kind in CHANNELS:
        denoiser = Denoiser(f"photo, {kind}", kind, PHOTO / f"restoration{'' if kind == 'grey' else '-3'}.onnx")
        body = request(noisy(CHANNELS[kind], SIDE), PHOTO)
        works.append(photograph(denoiser, Asked(included, body, cores), Asked(echo, body, cores)))
    return works


def asked(name: str, rows: int) -> Body:
    """A reconstruction of some rows."""
    return bodies.npy(f"/v1/models/{name}/reconstruct").ask(bodies.images(rows))


def reconstruction(name: str, folder: Path, rows: int, ours: Timer, echo: Timer) -> Work:
    """Encoder and decoder of a model of 28 x 28 images."""
    x, graphs = bodies.images(rows), Manifest.model_validate_json((folder / "manifest.json").read_bytes()).graphs
    encoder, decoder = (onnx.load(folder / graphs[key].file) for key in ("encoder", "decoder"))
    latent = graphs["decoder"].inputs["z"]
    counted = [*layers(encoder, {"x": x.shape}), *layers(decoder, {"z": (rows, *map(int, latent))})]
    timers = {ALONE: here(both(Model(str(folder)), x, rows)), OURS: ours, ECHO: echo}
    if rows > BLOCK:
        content = {key: (folder / graphs[key].file).read_bytes() for key in ("encoder", "decoder")}
        opened = {key: Session(content[key], PROVIDERS["cpu"], 1, graphs[key]) for key in content}
        timers[BLOCKS] = here(both(Model(str(folder)), x, BLOCK))
        timers[SESSIONS] = here(both(lambda part: opened["decoder"](opened["encoder"](part)[0]), x, BLOCK))
    return Work(name, rows, counted, timers)


def both(model: Callable[[Any], Any], x: bodies.Images, rows: int) -> Call:
    """A call of a model on images, so many at a time."""
    parts = [x[first : first + rows] for first in range(0, len(x), rows)]
    return lambda: [model(part) for part in parts]


def photograph(denoiser: Denoiser, ours: Timer, echo: Timer) -> Work:
    """The restoration of one photograph."""
    feed, opened = denoiser.feed(SIDE), session(denoiser.path.read_bytes())
    counted = layers(onnx.load(denoiser.path), {key: array.shape for key, array in feed.items()})
    timers = {ALONE: here(lambda: opened.run(None, feed)), OURS: ours, ECHO: echo}
    return Work(denoiser.name, 1, counted, timers)


# The page


def peaks_of(best: Mapping[str, float]) -> Peaks:
    """Peaks from the best samples of everything that was timed for the roofs."""
    places = (*caches(), "memory")
    operations = {name: value for name, value in best.items() if name.startswith(KINDS)}
    bandwidth = {place: max(value for name, value in best.items() if name.startswith(f"{place},")) for place in places}
    return Peaks(operations, bandwidth, caches())


def write(found: Results, options: argparse.Namespace) -> None:
    """Write the findings, the page and the plot."""
    raw = ignored_home() / "roofline.json"
    points = [
        {
            "name": work.name,
            "rows": work.rows,
            "intensity": total(work.layers).flop / total(work.layers).bytes,
            **{name: total(work.layers).flop / found.processor_s(work, name) for name in (ALONE, OURS)},
        }
        for work in found.works
    ]
    roofs = {kind: found.peaks.peak(kind) for kind in KINDS}
    raw.write_text(json.dumps({"roofs": roofs, "bandwidth": found.peaks.bandwidth, "points": points}))
    pages.write(page(found, options), options.out, "roofline", raw)
    print(options.out.read_text())


def page(found: Results, options: argparse.Namespace) -> str:
    """The page."""
    setting = (
        f"{pages.machine()}. One core, the client of the service on another. {options.rounds} rounds; each measures "
        "the peaks and then every model, by turns. Peaks are the best sample, everything else is the median. Seconds "
        "are of the processor, of all threads of the server or of the process, because other work ran on the machine: "
        f"its load average was {min(found.loads):.1f} to {max(found.loads):.1f}. `make bench-roofline` makes this page."
    )
    counted = (
        "FLOP count a multiplication with its addition as two operations, in float32 and int8 alike. Bytes are what "
        "the layers read and write at least: their weights once a call, their inputs and outputs once a row. Both are "
        "counted in the ONNX graphs, for convolutions and matrix products. `At least` is the time of the roof: each "
        "layer takes as long as its operations at the peak or its bytes, whichever is longer; weights come from the "
        "smallest cache that holds those of the graph, activations from the smallest that holds the layer's."
    )
    parts = (
        "Milliseconds of a request with 1,024 rows as .npy (3.2 MB each way). The service's own sessions are those of "
        "`service/runtime/session.py`, called in this process without HTTP. HTTP alone is a bare ASGI function on "
        "uvicorn that answers with the same bytes. The rest is reading the array, checking every number, joining and "
        "writing."
    )
    lines = ["# Roofline: how near to the core's limits", "", setting, "", "![Roofline](roofline.png)", ""]
    lines += ["## What the core does at most", "", *peak_table(found)]
    lines += ["## What a row needs, and takes", "", counted, "", *row_table(found)]
    lines += ["## 1,024 rows over HTTP", "", parts, "", *part_table(found)]
    lines += ["## What it means", "", *meaning(found), ""]
    return "\n".join(lines)


def peak_table(found: Results) -> list[str]:
    """Table of everything that was timed for the roofs."""
    lines = ["| | at most |", "|---|--:|"]
    for name, value in found.best.items():
        kind = name.partition(",")[0]
        roof = found.peaks.peak(kind) if kind in KINDS else found.peaks.bandwidth[kind]
        said = f"{value / 1e9:.0f} {'GFLOP/s' if kind in KINDS else 'GB/s'}"
        lines.append(f"| {name} | {f'**{said}**' if value == roof else said} |")
    sizes = ", ".join(f"{place} {size / KIB:,.0f} KiB" for place, size in found.peaks.sizes.items())
    return [*lines, "", f"The roofs are in bold. Caches: {sizes}; the cores share the last one.", ""]


def row_table(found: Results) -> list[str]:
    """Table of all models and numbers of rows."""
    heads = [
        *("model, rows a call", "FLOP a row", "bytes a row", "FLOP/byte", "at least, us a row", "limit"),
        *("onnxruntime, us a row", "of the roof", "service, us a row", "of the roof", "onnxruntime / service"),
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|"]
    for work in found.works:
        needed, (least, computing) = total(work.layers), found.peaks.least_s(work.layers)
        alone, ours = (found.processor_s(work, name) for name in (ALONE, OURS))
        limit = "operations" if 2.0 * computing >= least else "bytes"
        cells = [
            f"{work.name}, {work.rows:,}",
            f"{needed.flop / work.rows / 1e6:,.2f} M",
            f"{needed.bytes / work.rows / 1e3:,.1f} k",
            f"{needed.flop / needed.bytes:.1f}",
            f"{least / work.rows * 1e6:,.2f}",
            limit,
            f"{alone / work.rows * 1e6:,.2f}",
            f"{least / alone:.0%}",
            f"{ours / work.rows * 1e6:,.2f}",
            f"{least / ours:.0%}",
            f"{alone / ours:.2f} x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def part_table(found: Results) -> list[str]:
    """Table of where the time of the largest requests goes."""
    heads = [
        *("model", "onnxruntime, one call", "in blocks of 64", "in the service's sessions", "HTTP alone", "the rest"),
        *("service", "onnxruntime / service"),
    ]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * 7}"]
    for work in found.works:
        if work.rows <= BLOCK:
            continue
        alone, blocks, sessions, echo, ours = (
            found.processor_s(work, name) * 1e3 for name in (ALONE, BLOCKS, SESSIONS, ECHO, OURS)
        )
        cells = [alone, blocks, sessions, echo, ours - sessions - echo, ours]
        shown = " | ".join(f"{cell:.2f}" for cell in cells)
        lines.append(f"| {work.name} | {shown} | {alone / ours:.2f} x |")
    return [*lines, ""]


def meaning(found: Results) -> list[str]:
    """Conclusions, with this run's figures."""
    works = {f"{work.name} {work.rows}": work for work in found.works}

    def share(key: str, name: str = ALONE) -> str:
        return f"{found.peaks.least_s(works[key].layers)[0] / found.processor_s(works[key], name):.0%}"

    large = works["mlp 1024"]
    alone, sessions, ours = (found.processor_s(large, name) / large.rows * 1e6 for name in (ALONE, SESSIONS, OURS))
    most = alone / (alone + found.processor_s(large, ECHO) / large.rows * 1e6)
    return f"""
- **Matrix products** (`mlp`, `mnist-2d`): from 64 rows on the limit is the peak in float32, and onnxruntime is at
  {share("mlp 64")} and {share("mnist-2d 64")} of it. One row is limited by the bytes of its weights, which are read for
  it alone; that is why batches pay.
- **Small convolutions** (`mnist`, 24 to 48 channels on 7 x 7 to 28 x 28 pixels): {share("mnist 64")}. The rest is the
  element-wise x * sigmoid(x) between them, which is not counted, and kernels that few channels do not fill.
- **Photographs**: {share("photo, grey 1")} and {share("photo, colour 1")} of a limit that is nearly all operations; the
  service over HTTP is at {share("photo, grey 1", OURS)} and {share("photo, colour 1", OURS)}. A faster photograph needs
  fewer operations, or more of them in int8.
- **1,024 rows of `mlp`**: {alone:.1f} us a row in onnxruntime and {ours - sessions:.1f} around it, for 3.1 kB in and
  3.1 kB out: receiving, checking, joining and sending. In blocks of 64 rows and the service's sessions
  the model takes {sessions:.1f}. The bare function over HTTP would leave a ratio of {most:.2f} on one core. A dearer
  model such as `mnist` hides all of it.
""".strip().splitlines()


if __name__ == "__main__":
    main()
