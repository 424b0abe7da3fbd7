"""Computation of every peer: the graphs of a model folder on onnxruntime with one thread.

Run as a program it is onnxruntime alone: rows a second in batches of the given size, with no server around it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import numpy as np
import onnxruntime as ort  # after the line above

SHAPE = (1, 28, 28)
GAUSSIAN = 0
"""The column of a noise level that Gaussian noise has."""


class Model:
    """Reconstruct: (n, 1, 28, 28) -> (n, 1, 28, 28), at the posterior's mean."""

    def __init__(self, folder: str) -> None:
        self._encoder, self._decoder = (graph(folder, name) for name in ("encoder", "decoder"))

    def __call__(self, images: Any) -> Any:
        """Reconstruct images of any shape that holds whole images."""
        (mean,) = self._encoder.run(["mean"], {"x": as_rows(images)})
        return self._decoder.run(None, {"z": mean})[0]


class Denoiser:
    """Restore under Gaussian noise: (n, 1, 28, 28) -> (n, 1, 28, 28), at the posterior's mean."""

    def __init__(self, folder: str) -> None:
        names = ("recognition", "decoder", "fusion")
        self._recognition, self._decoder, self._fusion = (graph(folder, name) for name in names)
        self._noises = next(one.shape[1] for one in self._recognition.get_inputs() if one.name == "level")

    def __call__(self, images: Any, level: Any) -> Any:
        """Denoise images with Gaussian noise of standard deviation `level`: one number, or one a row."""
        y = as_rows(images)
        levels = np.zeros((len(y), self._noises), np.float32)
        levels[:, GAUSSIAN] = level
        seen = {"y": y, "mask": np.ones_like(y), "level": levels}
        (mean,) = self._recognition.run(["mean"], seen)
        (x_mean,) = self._decoder.run(None, {"z": mean})
        return self._fusion.run(["restored"], {"x_mean": x_mean, **seen})[0]


def graph(folder: str, name: str) -> Any:
    """Open one graph of the model."""
    return session(Path(folder, f"{name}.onnx").read_bytes())


def session(content: bytes) -> Any:
    """Open a graph with one thread and otherwise onnxruntime's defaults."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def as_rows(images: Any) -> Any:
    """Reshape to float32 (n, 1, 28, 28)."""
    return np.ascontiguousarray(images, np.float32).reshape(-1, *SHAPE)


def main(folder: str, rows: int, seconds: float) -> None:
    """Measure and print rows a second."""
    model, images = Model(folder), np.random.default_rng(0).random((rows, *SHAPE), np.float32)
    model(images)
    calls, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        model(images)
        calls += 1
    print(calls * rows / passed)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
