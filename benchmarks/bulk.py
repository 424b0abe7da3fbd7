"""Rows a second of `vae-bulk encode` beside onnxruntime alone: `make bench-bulk`.

MNIST, repeated to 100,000 rows of levels in one Parquet file of one row group. Each round runs, one after the other and
in turn first: onnxruntime in as many plain processes, on the same rows as arrays in memory; the same with pyarrow, by
which each process reads the file; `vae-bulk` with processes; `vae-bulk --ray local` with as many actors. All rates
leave out starting, which is told beside them, and the end of Ray.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow as pa
from pyarrow import parquet

from benchmarks.environments import HERE, InstallFailed, ignored_home, prepare
from benchmarks.pages import machine
from service.bulk.operator import MOST_ROWS
from service.bulk.source import READ_BYTES
from training.data.mnist import read_images

ROOT = HERE.parent
BATCHES = (64, 128, 256, 1024)
KEYS = ("rate", "of_core")
LEAST = {"processes": 0.85, "ray": 0.9}
"""Wanted: processes beside onnxruntime, and actors beside processes."""
COSTS = (
    "Decoding the file once takes {decoding:.2f} s of a core, {most} onnxruntime's time for the model. `vae-bulk` "
    "decodes it once for all its processes; the rest is the digest of what is read, checking, and writing. Onnxruntime "
    "with pyarrow decodes it in each process, and neither checks nor writes: beside that `vae-bulk` has {beside}. "
    "Rows a core-second are rows over the processor time of the computing processes: other work on the machine changes "
    "rows/s more than these. Those of `--ray` leave out Ray's daemons; rows/s do not."
)
RAY = ROOT / "tests" / "ray" / "requirements.txt"


def main() -> int:
    """Measure and write the page; the exit status is 1 if a ratio of the first model is below what is wanted."""
    parser = argparse.ArgumentParser(prog="make bench-bulk", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="mnist,mnist-2d")
    parser.add_argument("--out", type=Path, default=Path("docs/results/bulk.md"))
    options = parser.parse_args()
    ignored_home()
    try:
        ray: str | None = prepare("ray-test", RAY)
    except InstallFailed as error:
        print(f"without Ray: {error}", file=sys.stderr)
        ray = None
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory(dir=".bench") as home:
        source = Path(home) / "images.parquet"
        write(source, levels(options.data, options.rows))
        decoding = min(decoded(source) for _ in range(3))
        for model in options.models.split(","):
            for turn in range(options.rounds):
                one = measured(model, source, Path(home), options.workers, ray, turn)
                found.setdefault(model, []).append(one)
                print(f"{model} {turn + 1}: " + told(one), flush=True)
    options.out.write_text(page(found, options, decoding))
    print(f"wrote {options.out}")
    first = next(iter(found.values()))
    return int(ratio(first, "processes", "onnxruntime") < LEAST["processes"])


def levels(data: Path, rows: int) -> Any:
    """Images (rows, 784) of MNIST, repeated."""
    return np.resize(read_images(data, "train-images-idx3-ubyte").numpy().reshape(-1, 784), (rows, 784))


def write(path: Path, images: Any) -> None:
    """One file of one row group."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), images.shape[1])
    parquet.write_table(pa.table({"image": lists}), path)


def measured(
    model: str, source: Path, home: Path, workers: int, ray: str | None, turn: int
) -> dict[str, dict[str, float]]:
    """Rates, seconds of start, and processor seconds of one round."""
    asked = model, str(source), str(home / "out"), str(workers)
    runs = {
        "onnxruntime": lambda: bare(model, source, workers),
        "pyarrow": lambda: bare(model, source, workers, reads=True),
        "processes": lambda: bulk(sys.executable, *asked),
    }
    if ray is not None:
        runs["ray"] = lambda: bulk(ray, *asked, "--ray", "local")
    names = list(runs)
    found = {}
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
        shutil.rmtree(home / "out", ignore_errors=True)
        found[name] = runs[name]()
    return found


def bulk(python: str, model: str, source: str, out: str, workers: str, *further: str) -> dict[str, float]:
    """One run of the command."""
    command = [python, "-m", "service.bulk", "encode", source, out, "--model", model, "--workers", workers]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "--json", "--no-progress", *further], check=True, capture_output=True, text=True, env=environment
    )
    report = json.loads(run.stdout)
    rate, of_core = (report["done"] / report[seconds] for seconds in ("busy_s", "processor_s"))
    return {"rate": rate, "of_core": of_core, "start_s": report["start_s"]}


def bare(model: str, source: Path, workers: int, *, reads: bool = False) -> dict[str, float]:
    """onnxruntime in plain processes, which begin together; with `reads` each reads the file."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(workers + 1), context.SimpleQueue()
    file = max((ROOT / "models" / model).iterdir())
    graph = file / json.loads((file / "manifest.json").read_text())["graphs"]["encoder"]["file"]
    began = time.monotonic()
    running = [
        context.Process(target=alone, args=(graph, source, k, workers, barrier, answers, reads)) for k in range(workers)
    ]
    for one in running:
        one.start()
    barrier.wait()
    start = time.monotonic()
    found = [answers.get() for _ in running]
    ended = time.monotonic()
    rows, used = (sum(one) for one in zip(*found, strict=True))
    for one in running:
        one.join()
    return {"rate": rows / (ended - start), "of_core": rows / used, "start_s": start - began}


def alone(graph: Path, source: Path, place: int, workers: int, barrier: Any, answers: Any, reads: bool) -> None:
    """Compute one row of `workers`, from memory or from the file, in batches of the size that is quickest here."""
    rows = floats(parquet.read_table(source).column("image").combine_chunks())[place::workers]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(graph.read_bytes(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    size = min(BATCHES, key=lambda size: min(timed(session, name, rows[:size]) for _ in range(5)) / size)
    barrier.wait()
    used = time.process_time()
    count = 0
    for batch in its_batches(source, place, workers, size) if reads else cut(rows, size):
        session.run(None, {name: batch})
        count += len(batch)
    answers.put((count, time.process_time() - used))


def cut(rows: Any, size: int) -> Iterator[Any]:
    """Batches of rows in memory."""
    return (rows[at : at + size] for at in range(0, len(rows), size))


def its_batches(source: Path, place: int, workers: int, size: int) -> Iterator[Any]:
    """Every `workers`-th batch of the file; the others are decoded too."""
    for k, batch in enumerate(parquet.ParquetFile(source).iter_batches(size, use_threads=False)):
        if k % workers == place:
            yield floats(batch.column("image"))


def floats(lists: Any) -> Any:
    """Images as the model takes them."""
    return np.divide(lists.flatten().to_numpy().reshape(-1, 1, 28, 28), np.float32(255.0), dtype=np.float32)


def timed(session: Any, name: str, rows: Any) -> float:
    """Seconds of one batch."""
    began = time.monotonic()
    session.run(None, {name: rows})
    return time.monotonic() - began


def ratio(rounds: Sequence[dict[str, dict[str, float]]], one: str, other: str, key: str = "of_core") -> float:
    """The median of the ratios of each round."""
    return median(found[one][key] / found[other][key] for found in rounds)


def told(found: dict[str, dict[str, float]]) -> str:
    """One round in a line."""
    return ", ".join(
        f"{name} {one['rate']:.0f}/s, {one['of_core']:.0f} a core-second, after {one['start_s']:.1f} s"
        for name, one in found.items()
    )


def decoded(source: Path) -> float:
    """Processor seconds of decoding the images once."""
    began = time.process_time()
    for _ in parquet.ParquetFile(source, buffer_size=READ_BYTES, pre_buffer=False).iter_batches(
        MOST_ROWS, use_threads=False
    ):
        pass
    return time.process_time() - began


def beside_decoding(found: dict[str, list[dict[str, dict[str, float]]]], decoding: float, rows: int) -> Iterator[str]:
    """For each model, what decoding takes of onnxruntime's time."""
    for model, rounds in found.items():
        computing = rows / median(one["onnxruntime"]["of_core"] for one in rounds)
        yield f"for `{model}` {decoding / computing:.0%} of"


def page(found: dict[str, list[dict[str, dict[str, float]]]], options: argparse.Namespace, decoding: float) -> str:
    """The page of results."""
    about = (
        f"`vae-bulk encode` of {options.rows:,} images of 28 x 28 (MNIST, repeated) from one Parquet file of one row "
        f"group, with {options.workers} processes, and with {options.workers} Ray actors, beside onnxruntime in "
        f"{options.workers} plain processes: on arrays in memory, and with pyarrow, by which each reads the file. Each "
        f"process has one thread; rates leave out the start, which stands beside them, and the end of Ray. Medians of "
        f"{options.rounds} rounds, whose order changes; ratios are of the same round. {machine()}. `make bench-bulk` "
        "makes this page."
    )
    lines = [
        "# Bulk runs",
        "",
        about,
        "",
        "| model | run | rows/s | ratio | rows a core-second | ratio | start, s |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    names = {
        "onnxruntime": ("onnxruntime alone", ""),
        "pyarrow": ("onnxruntime with pyarrow", "onnxruntime"),
        "processes": ("`vae-bulk`", "onnxruntime"),
        "ray": ("`vae-bulk --ray local`", "processes"),
    }
    for model, rounds in found.items():
        for name, (title, beside) in names.items():
            if name not in rounds[0]:
                continue
            rate, of_core, start = (median(one[name][key] for one in rounds) for key in ("rate", "of_core", "start_s"))
            wall, core = (
                f"{ratio(rounds, name, beside, key):.2f} of {names[beside][0]}" if beside else "" for key in KEYS
            )
            lines.append(f"| {model} | {title} | {rate:,.0f} | {wall} | {of_core:,.0f} | {core} | {start:.1f} |")
    first = next(iter(found.values()))
    reached = ratio(first, "processes", "onnxruntime")
    lines += [
        "",
        f"**`{next(iter(found))}`: {reached:.2f} of onnxruntime's rows a core-second** "
        f"(at least {LEAST['processes']} wanted)"
        + (
            f", **actors {ratio(first, 'ray', 'processes'):.2f} of processes** (at least {LEAST['ray']} wanted)."
            if "ray" in first[0]
            else "; Ray could not be installed."
        ),
        "",
        COSTS.format(
            decoding=decoding,
            most=" and ".join(beside_decoding(found, decoding, options.rows)),
            beside=" and ".join(
                f"{ratio(rounds, 'processes', 'pyarrow'):.2f} of the rows a core-second for `{model}`"
                for model, rounds in found.items()
            ),
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
