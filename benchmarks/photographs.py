"""Seconds and peak memory of restored photographs on one core: `make bench-photographs`.

Four parts, each of which can be measured alone:

- `cost`: the service beside classical methods, and at large pictures. The service runs with its default settings. Its
  memory is the sum of the peaks of its processes; of a classical method it is what a process takes more than before.
- `graphs`: onnxruntime alone, with one thread, on the version's restoration graphs and on graphs of DnCNN and DRUNet.
- `service`: the same photographs over HTTP, as .npy with a known level and as PNG with an estimated one.
- `tiles`: two tiles in one session of two threads, and in two sessions of one thread; on two cores.

The tables go into the page of photographs.
"""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from benchmarks.bodies import NPY, PNG, Body
from benchmarks.denoisers import CHANNELS, Denoiser, denoisers
from benchmarks.environments import HERE
from benchmarks.peers.model import graph
from benchmarks.servers import Server, end_when_asked
from experiments.photographs import speed
from experiments.photographs.cases import gaussian
from experiments.photographs.methods import DRAWS, rivals
from experiments.photographs.sets import Picture
from experiments.photographs.speed import COST, SPEED, TIMED
from service.contract.images import Pixels
from service.contract.manifest import Graph, Manifest
from service.runtime.session import PROVIDERS, Session
from service.runtime.tiling import EXACT_SIDE
from training.evaluation.served import npy
from training.extras import needed

COMMAND = [sys.executable, str(HERE.absolute() / "peers" / "ours.py")]
SIDE = 512
SIGMA = 25.0
LARGE = {"12 megapixels": (3000, 4000), "24 megapixels": (4000, 6000)}
"""Heights and widths of large pictures."""
GRAIN = 8.0
"""Standard deviation of the noise of large pictures, in 255ths."""
LIMIT_S = 600.0
EVENTS = "application/x-ndjson"
"""Form of answers that may take longer than VAE_TIMEOUT_S."""
SETTINGS = {"total variation": 1.0, "non-local means": 0.8, "BM3D": 0.0}
"""Classical methods, and a usual setting of each."""
FIELDS = ("what", "grey 512 x 512, s", "colour 512 x 512, s", "colour, s", "peak, MiB")
PARTS = ("cost", "graphs", "service", "tiles")
DEAR_GFLOP = 1000.0
"""A call of more operations is not preceded by one that is not counted: it takes tens of seconds, of which the first
use of memory is less than 2 %."""
Row = dict[str, str]


def main() -> int:
    """Measure, print and write the table; the exit status is 1 if a large picture is not answered."""
    parser = argparse.ArgumentParser(prog="make bench-photographs", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/photo/1"), help="the version's folder (%(default)s)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[*PARTS], help="what to measure; all by default")
    parser.add_argument("--repeats", type=int, default=3, help="calls behind a median (%(default)s)")
    parser.add_argument("--large", nargs="*", choices=LARGE, default=[*LARGE], help="large pictures of `cost`")
    parser.add_argument(
        "--methods", nargs="*", choices=SETTINGS, default=[*SETTINGS], help="classical methods of `cost`"
    )
    parser.add_argument(
        "--sides", nargs="*", type=int, default=[512, 1024], help="of `graphs` and `service`, in pixels"
    )
    parser.add_argument("--images", nargs="*", choices=CHANNELS, default=[*CHANNELS], help="of `graphs` and `service`")
    parser.add_argument("--add", action="store_true", help="keep the figures of earlier runs, on the same machine")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the page (%(default)s)")
    options = parser.parse_args()
    if not (options.model / "manifest.json").exists():
        raise SystemExit(f"there is no version in {options.model}; --model names its folder")
    needed("skimage")
    end_when_asked()
    cores = os.sched_getaffinity(0)
    complete = True
    for part in options.parts:
        # One core but for `tiles`; threads and child processes that begin later inherit it.
        os.sched_setaffinity(0, cores if part == "tiles" else {max(cores)})
        rows = []
        for row in {"cost": measured, "graphs": graph_rows, "service": service_rows, "tiles": tile_rows}[part](options):
            rows.append(row)
            print(", ".join(f"{name}: {value}" for name, value in row.items()), flush=True)
        if part == "cost":
            complete = not any("not answered" in row.get("colour, s", "") for row in rows)
            names = {row["what"] for row in rows}
            before = [row for row in speed.read(options.out / COST) if options.add and row["what"] not in names]
            write(options.out / COST, FIELDS, before + rows)
        else:
            before = [row for row in speed.read(options.out / SPEED) if options.add or row["part"] != part]
            write(options.out / SPEED, TIMED, before + rows)
    speed.renew(options.out)
    return int(not complete)


def write(path: Path, fields: Sequence[str], rows: Sequence[Row]) -> None:
    """Write a table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


# onnxruntime alone, the service, tiles


def graph_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Calls of every graph at every size, in alternating order."""
    chosen = [one for one in denoisers(options.model) if one.kind in options.images]
    sessions = [(one, graph(str(one.path.parent), one.path.stem)) for one in chosen]
    for side in options.sides:
        feeds = {one.path: one.feed(side) for one, _ in sessions}
        costs = {one.path: one.cost(side) for one, _ in sessions}
        for one, session in sessions:
            if costs[one.path].flop < DEAR_GFLOP * 1e9:
                session.run(None, feeds[one.path])
        for turn in range(options.repeats):
            for one, session in sessions[:: -1 if turn % 2 else 1]:
                feed, cost = feeds[one.path], costs[one.path]
                spent = clocked(partial(session.run, None, feed))
                known = {"gflop": f"{cost.flop / 1e9:.1f}", "eight_bits": f"{cost.eight_bits / cost.flop:.3f}"}
                yield {"part": "graphs", "what": one.name, "image": one.kind, "side": str(side), **known, **spent}


def service_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Calls of the service at every size, grey and colour, as arrays with a known level and as pictures without."""
    probe = request(noisy(1, 64), options.model)
    with tempfile.TemporaryDirectory() as home:
        server = Server(COMMAND, options.model, probe, Path(home, "log"))
        try:
            bodies = {
                (what, kind, side): make(noisy(channels, side), options.model)
                for side in options.sides
                for kind, channels in CHANNELS.items()
                if kind in options.images
                for what, make in ((".npy, level known", request), ("PNG, level estimated", photograph))
            }
            for turn in range(options.repeats + 1):
                for what, kind, side in list(bodies)[:: 1 if turn % 2 else -1]:
                    before = server.cpu_s()
                    seconds, status = timed(server, bodies[what, kind, side])
                    used = server.cpu_s() - before
                    if status != 200:
                        raise SystemExit(f"the service answered {status} to {what} of {side} x {side}")
                    if turn:  # the first ones warm up
                        spent = {"seconds": f"{seconds:.4f}", "processor_s": f"{used:.2f}", "load": load()}
                        yield {"part": "service", "what": what, "image": kind, "side": str(side), **spent}
        finally:
            server.stop()


def tile_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Two tiles of the service's size, one after the other and at once, in sessions as the service opens them."""
    for view in Manifest.model_validate_json((options.model / "manifest.json").read_bytes()).views():
        described = view.graphs["restoration"]
        content = (options.model / described.file).read_bytes()
        kind = "grey" if described.inputs["y"][0] == 1 else "colour"
        feed = Denoiser("", kind, options.model / described.file).feed(EXACT_SIDE)
        arrays = [feed[name] for name in described.inputs]
        with ThreadPoolExecutor(2) as pool:
            ways = tile_ways(content, described, arrays, pool)
            for turn in range(options.repeats + 1):
                for what in list(ways)[:: 1 if turn % 2 else -1]:
                    spent = clocked(ways[what])
                    if turn:  # the first ones warm up
                        yield {"part": "tiles", "what": what, "image": kind, "side": str(EXACT_SIDE), **spent}


def tile_ways(
    content: bytes, described: Graph, arrays: list[Pixels], pool: Executor
) -> dict[str, Callable[[], object]]:
    """Calls that compute two tiles, by what they use."""
    single, other, double = (Session(content, PROVIDERS["cpu"], threads, described) for threads in (1, 1, 2))
    return {
        "one session of one thread, one after the other": lambda: [single(*arrays) for _ in range(2)],
        "one session of two threads, one after the other": lambda: [double(*arrays) for _ in range(2)],
        "two sessions of one thread, at once": lambda: list(pool.map(lambda one: one(*arrays), (single, other))),
    }


def clocked(call: Callable[[], object]) -> Row:
    """Seconds and processor seconds of a call in this process, and the load of the machine before it."""
    before, began, used = load(), time.perf_counter(), time.process_time()
    call()
    seconds, used = time.perf_counter() - began, time.process_time() - used
    return {"seconds": f"{seconds:.4f}", "processor_s": f"{used:.4f}", "load": before}


def load() -> str:
    """Load average of the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


# Cost


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """Rows of the table: classical methods, then the service."""
    for name in options.methods:
        yield of_rival(name, options.repeats)
    probe = request(noisy(1, 64), options.model)
    with tempfile.TemporaryDirectory() as home:
        server = Server(COMMAND, options.model, probe, Path(home, "log"))
        try:
            for what, query in (
                ("", ""),
                (" with std", "uncertainty=true"),
                (f" with {DRAWS} draws", f"draws={DRAWS}"),
            ):
                yield of_size(server, options, what, query)
            for name in options.large:
                for kind in ("JPEG", "PNG"):
                    yield of_large(server, options.model, name, kind)
        finally:
            server.stop()


def of_rival(name: str, repeats: int) -> Row:
    """Seconds and memory of a classical method, each image size in a process of its own."""
    context = multiprocessing.get_context("spawn")
    seconds, peaks = [], []
    for channels in (1, 3):
        with context.Pool(1) as pool:
            taken, peak = pool.apply(_of_rival, (name, channels, repeats))
        seconds.append(f"{taken:.2f}")
        peaks.append(peak)
    return {"what": name, FIELDS[1]: seconds[0], FIELDS[2]: seconds[1], FIELDS[4]: f"+{max(peaks):.0f}"}


def _of_rival(name: str, channels: int, repeats: int) -> tuple[float, float]:
    """Median seconds, and the growth of this process's peak memory in MiB."""
    method = next(method for method in rivals() if method.name == name)
    case = gaussian(SIGMA)
    seen = case.spoilt(Picture("", "", scene(SIDE, SIDE, channels)), 0).seen
    taken, before = [], peak_mib()
    for _ in range(repeats):
        began = time.perf_counter()
        method.restore(case.task, seen, SETTINGS[name])
        taken.append(time.perf_counter() - began)
    return median(taken), peak_mib() - before


def peak_mib() -> float:
    """Peak memory of this process in MiB."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024.0


def of_size(server: Server, options: argparse.Namespace, what: str, query: str) -> Row:
    """Seconds and memory of the service at 512 x 512, grey and colour."""
    server.reset_peaks()
    seconds = []
    for channels in (1, 3):
        body = request(noisy(channels, SIDE), options.model, query)
        taken = [timed(server, body) for _ in range(options.repeats + 1)][1:]  # the first one warms up
        seconds.append(f"{median(one for one, _ in taken):.3f}" if all(said == 200 for _, said in taken) else "refused")
    name = f"{options.model.parent.name}{what}"
    return {"what": name, FIELDS[1]: seconds[0], FIELDS[2]: seconds[1], FIELDS[4]: peak(server)}


def of_large(server: Server, model: Path, name: str, kind: str) -> Row:
    """Seconds and memory of the service at one large picture, in and out as a picture.

    Where VAE_TIMEOUT_S does not suffice, the answer is asked for as a stream of events.
    """
    content = picture(*LARGE[name], kind)
    server.reset_peaks()
    for accept in (PNG, EVENTS):
        head = {"content-type": f"image/{kind.lower()}", "accept": accept}
        seconds, status = timed(server, Body(f"/v1/models/{model.parent.name}/denoise", head, content))
        if status != 504:
            break
    said = f"{seconds:.1f}" if status == 200 else f"not answered: {status}"
    stream = ", as events" if accept == EVENTS else ""
    return {"what": f"{model.parent.name}, {name}, {kind}{stream}", FIELDS[3]: said, FIELDS[4]: peak(server)}


def timed(server: Server, body: Body) -> tuple[float, int]:
    """Seconds until the whole answer has come, and its status."""
    began = time.perf_counter()
    status, _ = server.ask(body, LIMIT_S)
    return time.perf_counter() - began, status


def peak(server: Server) -> str:
    """Sum of the peaks of the server's processes in MiB; pages that they share count in each."""
    return f"{sum(server.peaks_mib().values()):.0f}"


def request(y: Pixels, model: Path, query: str = "") -> Body:
    """Denoise of an image (c, h, w) in .npy, level known."""
    path = f"/v1/models/{model.parent.name}/denoise?noise=gaussian&level={SIGMA / 255.0}"
    return Body(f"{path}&{query}" if query else path, {"content-type": NPY, "accept": NPY}, npy(y[None]))


def photograph(y: Pixels, model: Path) -> Body:
    """Denoise of an image (c, h, w) as PNG, answered as PNG, level unknown."""
    file = io.BytesIO()
    rows = np.rint(np.clip(y, 0.0, 1.0) * 255.0).astype(np.uint8)
    Image.fromarray(rows[0] if len(rows) == 1 else rows.transpose(1, 2, 0)).save(file, "PNG", compress_level=1)
    return Body(f"/v1/models/{model.parent.name}/denoise", {"content-type": PNG, "accept": PNG}, file.getvalue())


def noisy(channels: int, side: int) -> Pixels:
    """The scene with noise, (c, side, side)."""
    return gaussian(SIGMA).spoilt(Picture("", "", scene(side, side, channels)), 0).seen.y[0]


def scene(height: int, width: int, channels: int) -> Pixels:
    """scikit-image's astronaut, enlarged or shrunk, (c, h, w) in [0, 1]."""
    return np.ascontiguousarray(levels((height, width), "RGB" if channels == 3 else "L") / np.float32(255.0))


def levels(size: Sequence[int], mode: str) -> Pixels:
    """The astronaut's levels, (c, h, w), of a size (h, w)."""
    image = Image.fromarray(needed("skimage.data").astronaut()).convert(mode)
    found = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC), np.float32)
    return found[None] if mode == "L" else found.transpose(2, 0, 1)


def picture(height: int, width: int, kind: str) -> bytes:
    """The astronaut as a large picture with the grain of a sensor, as JPEG of quality 90 or PNG."""
    rng, rows = np.random.default_rng(0), levels((height, width), "RGB").transpose(1, 2, 0)
    grainy = np.empty(rows.shape, np.uint8)
    for top in range(0, height, SIDE):  # in parts, because float64 noise of all would take 600 MB
        part = rows[top : top + SIDE]
        grainy[top : top + SIDE] = np.clip(part + GRAIN * rng.standard_normal(part.shape), 0.0, 255.0)
    file = io.BytesIO()
    Image.fromarray(grainy).save(file, kind, **({"quality": 90} if kind == "JPEG" else {"compress_level": 1}))
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
