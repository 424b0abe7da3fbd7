"""Throughput of a mixed load of three image sizes against that of the same images size by size: `make bench-sizes`.

A small convolutional model of free size, one worker of one thread, requests and answers in .npy. A round puts the mixed
load and each size alone on the same server, one after the other; every other round begins with the mixed one. Its
result is the time that the images would take size by size, over that of the mixed load.
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
CONNECTIONS = 24
LEAST = 0.9
"""Lower limit of the median ratio."""
COMMAND = [sys.executable, str(HERE.absolute() / "peers" / "ours.py")]


def main() -> int:
    """Measure and print; the exit status is 1 if the mixed load is slower than it may be."""
    parser = argparse.ArgumentParser(prog="make bench-sizes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=2)
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
    print(f"mixed / size by size: {middle:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}; at least {LEAST} wanted")
    return int(middle < LEAST)


def measured(port: int, probe: Body, mixed: list[bytes], options: argparse.Namespace) -> list[float]:
    """Ratios of images a second, mixed to size by size, of each round."""
    loads: dict[str, tuple[Body, list[bytes]]] = {"mixed": (probe, mixed[1:])}
    loads |= {f"{h} x {w}": (probe._replace(content=one), []) for (h, w), one in zip(SIZES, mixed, strict=True)}
    ratios = []
    for turn in range(options.rounds):
        rates = {}
        for name in sorted(loads, reverse=bool(turn % 2)):
            body, others = loads[name]
            found = closed.run(port, body, CONNECTIONS, options.seconds, others)
            if found.failures:
                raise SystemExit(f"{found.failures} requests of the {name} load failed")
            rates[name] = found.rate
        alone = len(SIZES) / sum(1.0 / rate for name, rate in rates.items() if name != "mixed")
        ratios.append(rates["mixed"] / alone)
        print(f"round {turn + 1}: {rates['mixed']:.0f} of {alone:.0f} images/s", flush=True)
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
