"""Seconds and peak memory of restored photographs on one core, beside classical methods: `make bench-photographs`.

The service runs with its default settings. Its memory is the sum of the peaks of its processes; of a classical method
it is what a process takes more than before. `restore` of the experiments puts the table into its page.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from benchmarks.bodies import NPY, PNG, Body
from benchmarks.environments import HERE
from benchmarks.servers import Server, end_when_asked
from experiments.photographs.cases import gaussian
from experiments.photographs.methods import DRAWS, rivals
from experiments.photographs.report import COST
from experiments.photographs.sets import Picture
from service.contract.images import Pixels
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
Row = dict[str, str]


def main() -> int:
    """Measure, print and write the table; the exit status is 1 if a large picture is not answered."""
    parser = argparse.ArgumentParser(prog="make bench-photographs", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/photo/1"), help="the version's folder (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="calls behind a median (%(default)s)")
    parser.add_argument("--large", nargs="*", choices=LARGE, default=[*LARGE], help="large pictures")
    parser.add_argument("--methods", nargs="*", choices=SETTINGS, default=[*SETTINGS], help="classical methods")
    parser.add_argument("--out", type=Path, default=Path("docs/results") / COST, help="the table (%(default)s)")
    options = parser.parse_args()
    if not (options.model / "manifest.json").exists():
        raise SystemExit(f"there is no version in {options.model}; --model names its folder")
    needed("skimage")
    end_when_asked()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # child processes inherit it
    rows = []
    for row in measured(options):
        rows.append(row)
        print(", ".join(f"{name}: {value}" for name, value in row.items()), flush=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return int(any("not answered" in row["colour, s"] for row in rows if "colour, s" in row))


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
