"""The service beside a bare ASGI function: `make bench`. Rounds alternate; the ratio is that of medians."""

from __future__ import annotations

import argparse
import base64
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from benchmarks.load import Load, request, run
from service import manifest

RAW, JSON, PNG = "application/octet-stream", "application/json", "image/png"


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/mnist/1"))
    parser.add_argument("--seconds", type=float, default=2.0, help="of one load")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ours, bare = free_port(), free_port()
    repository = {"VAE_MODELS": str(options.model.parent.parent), "VAE_DEFAULT_MODEL": options.model.parent.name}
    with (
        serving(ours, [sys.executable, "-m", "service"], VAE_PORT=str(ours), VAE_THREADS="1", **repository),
        serving(bare, [sys.executable, "-m", "benchmarks.bare", str(options.model), str(bare)]),
    ):
        print(
            f"{os.cpu_count()} CPUs, one worker, one thread a session, {options.rounds} rounds of {options.seconds} s"
        )
        print(f"{'operation':12} {'form':6} {'conn':>4} {'req/s':>8} {'p50 ms':>8} {'p99 ms':>8} {'x bare':>7}")
        for connections in (1, 16, 64):
            baseline: list[Load] = []
            for name, form, payload in workloads(options.model):
                loads: list[Load] = []
                for _ in range(options.rounds):
                    loads.append(run(ours, payload, connections, options.seconds))
                    if name == "reconstruct" and form == "raw":
                        baseline.append(run(bare, payload, connections, options.seconds))
                report(name, form, connections, loads, baseline)


def workloads(folder: Path) -> list[tuple[str, str, bytes]]:
    """(operation, form, request) of one image each."""
    channels, height, width = manifest.read(folder).input_shape
    image = np.zeros((channels, height, width), np.float32)
    image[:, height // 4 : -height // 4, width // 2] = 1.0
    file = io.BytesIO()
    Image.fromarray((image * 255).astype(np.uint8).transpose(1, 2, 0).squeeze()).save(file, "PNG")
    picture = file.getvalue()
    listed = str({"images": [image.tolist()]}).replace("'", '"').encode()
    coded = b'{"images": ["' + base64.b64encode(picture) + b'"]}'
    return [
        ("reconstruct", "raw", request("/v1/reconstruct", image.tobytes(), RAW, RAW)),
        ("reconstruct", "json", request("/v1/reconstruct", listed, JSON, JSON)),
        ("reconstruct", "base64", request("/v1/reconstruct", coded, JSON, JSON)),
        ("encode", "raw", request("/v1/encode", image.tobytes(), RAW, RAW)),
        ("denoise", "raw", request("/v1/denoise?level=0.25", image.tobytes(), RAW, RAW)),
        ("denoise", "png", request("/v1/denoise?level=0.25", picture, PNG, PNG)),
        ("sample", "raw", request("/v1/sample?seed=1", b"", JSON, RAW)),
    ]


def report(name: str, form: str, connections: int, loads: list[Load], baseline: list[Load]) -> None:
    """One row."""
    rate = median(load.rate for load in loads)
    p50, p99 = (median(load.percentile_ms(percent) for load in loads) for percent in (50, 99))
    bare = median(load.rate for load in baseline)
    failures = sum(load.failures for load in loads)
    note = f"  {failures} FAILED" if failures else ""
    print(f"{name:12} {form:6} {connections:4} {rate:8.0f} {p50:8.2f} {p99:8.2f} {rate / bare:7.2f}{note}", flush=True)


@contextmanager
def serving(port: int, command: list[str], **settings: str) -> Iterator[None]:
    """A server process that answers on `port`."""
    process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(10)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


if __name__ == "__main__":
    main()
