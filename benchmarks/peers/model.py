"""What every peer computes: onnxruntime with one thread over the two graphs of a model folder, numpy in and out.

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


class Model:
    """Reconstruct: (n, 1, 28, 28) -> (n, 1, 28, 28), at the posterior's mean."""

    def __init__(self, folder: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        providers = ["CPUExecutionProvider"]
        self._encoder, self._decoder = (
            ort.InferenceSession(Path(folder, f"{name}.onnx").read_bytes(), options, providers=providers)
            for name in ("encoder", "decoder")
        )

    def __call__(self, images: Any) -> Any:
        """The images as the model sees them; any shape that has whole images is taken."""
        rows = np.ascontiguousarray(images, np.float32).reshape(-1, *SHAPE)
        (mean,) = self._encoder.run(["mean"], {"x": rows})
        return self._decoder.run(None, {"z": mean})[0]


def main(folder: str, rows: int, seconds: float) -> None:
    """Print rows a second."""
    model, images = Model(folder), np.random.default_rng(0).random((rows, *SHAPE), np.float32)
    model(images)
    calls, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        model(images)
        calls += 1
    print(calls * rows / passed)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
