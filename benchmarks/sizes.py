"""Throughput of a mixed load of three image sizes against that of one size of as many pixels: `make bench-sizes`.

A small convolutional model of free size, one worker of one thread, requests and answers in .npy. A round puts both
loads on the same server, one after the other, and the order alternates. Its result is the ratio of pixels a second.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from benchmarks import closed
from benchmarks.bodies import NPY, Body
from benchmarks.environments import HERE
from benchmarks.servers import Server, end_when_asked
from training.export import export_vae

SIZES = ((64, 64), (96, 96), (128, 128))
ONE = (96, 104)
"""About the mean number of pixels of `SIZES`."""
CONNECTIONS = 24
LEAST = 0.9
"""Lower limit of the median ratio."""
COMMAND = [sys.executable, str(HERE.absolute() / "peers" / "ours.py")]


def main() -> int:
    """Measure and print; the exit status is 1 if the mixed load is slower than it may be."""
    parser = argparse.ArgumentParser(prog="make bench-sizes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=3)
    options = parser.parse_args()
    closed.check()
    end_when_asked()
    mixed = [content(*size) for size in SIZES]
    with tempfile.TemporaryDirectory() as home:
        folder = model(Path(home))
        probe = Body("/v1/reconstruct", {"content-type": NPY, "accept": NPY}, mixed[0])
        server = Server(COMMAND, folder, probe, Path(home, "log"))
        try:
            ratios = measured(server.port, probe, mixed, options)
        finally:
            server.stop()
    middle = median(ratios)
    print(f"mixed / one size: {middle:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}; at least {LEAST} wanted")
    return int(middle < LEAST)


def measured(port: int, probe: Body, mixed: list[bytes], options: argparse.Namespace) -> list[float]:
    """Ratios of pixels a second, mixed to one size, of each round."""
    loads = {
        "mixed": (probe, mixed[1:], sum(h * w for h, w in SIZES) / len(SIZES)),
        "one": (probe._replace(content=content(*ONE)), [], ONE[0] * ONE[1]),
    }
    ratios = []
    for turn in range(options.rounds):
        rates = {}
        for name in sorted(loads, reverse=bool(turn % 2)):
            body, others, pixels = loads[name]
            found = closed.run(port, body, CONNECTIONS, options.seconds, others)
            if found.failures:
                raise SystemExit(f"{found.failures} requests of the {name} load failed")
            rates[name] = found.rate * pixels
        ratios.append(rates["mixed"] / rates["one"])
        print(f"round {turn + 1}: {rates['mixed'] / 1e6:.2f} of {rates['one'] / 1e6:.2f} Mpixel/s", flush=True)
    return ratios


def content(height: int, width: int) -> bytes:
    """One grey image as .npy."""
    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).random((1, 1, height, width), np.float32))
    return file.getvalue()


def model(home: Path) -> Path:
    """A version of an untrained model of about the cost of a small denoiser."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(), nn.Conv2d(64, 8, 3, 1, 1)
    )
    decoder = nn.Sequential(
        nn.Conv2d(4, 64, 3, 1, 1), nn.SiLU(), nn.ConvTranspose2d(64, 32, 2, 2), nn.SiLU(),
        nn.ConvTranspose2d(32, 32, 2, 2), nn.SiLU(), nn.Conv2d(32, 1, 3, 1, 1), nn.Sigmoid(),
    )  # fmt: skip
    return export_vae(encoder, decoder, torch.rand(4, 1, 32, 32), home / "models", "sizes", multiple_of=4)


if __name__ == "__main__":
    sys.exit(main())
