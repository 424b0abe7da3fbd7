"""BentoML: adaptive batching of JSON arrays; pictures as its own PIL type, in and out."""

from __future__ import annotations

import os
import sys

import bentoml
import numpy as np
from PIL.Image import Image, fromarray

from benchmarks.peers.model import Model


@bentoml.service(workers=1, traffic={"timeout": 30, "max_concurrency": 1024})
class Reconstruct:
    """One worker."""

    def __init__(self) -> None:
        self.model = Model(os.environ["BENCH_FOLDER"])

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000)
    def images(self, images: np.ndarray) -> np.ndarray:
        """Arrays in JSON."""
        return self.model(images)

    @bentoml.api
    def picture(self, image: Image) -> Image:
        """PNG in, PNG out."""
        pixels = np.asarray(image.convert("L"), np.float32) / 255.0
        answer = fromarray(np.rint(self.model(pixels)[0, 0] * 255.0).astype(np.uint8))
        answer.format = "PNG"
        return answer


if __name__ == "__main__":
    folder, port = sys.argv[1:]
    command = [sys.executable, "-m", "bentoml", "serve", "benchmarks.peers.bentoml:Reconstruct"]
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": f"{folder}/.bentoml"}
    os.execve(  # noqa: S606  # no shell wanted
        sys.executable,
        [*command, "--host", "127.0.0.1", "--port", port, "--timeout", "30", "-q"],
        os.environ | quiet | {"BENCH_FOLDER": folder},
    )
