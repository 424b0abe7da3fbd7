"""BentoML: adaptive batching of JSON arrays and of pictures, with its PIL type."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import bentoml
import numpy as np

# Its batcher, used where it stands: a batchable API answers arrays only, so that a picture's endpoint would have to
# call one in a second service, and with these versions 64 connections break that hop.
from bentoml._internal.marshal.dispatcher import CorkDispatcher
from PIL.Image import Image, fromarray

from benchmarks.peers.model import Denoiser, Model

BATCH, LATENCY_MS = 64, 1000


@bentoml.service(workers=1, traffic={"timeout": 30, "max_concurrency": 1024})
class Vae:
    """Service with one worker."""

    def __init__(self) -> None:
        folder = os.environ["BENCH_FOLDER"]
        self.reconstruct, self.denoise = Model(folder), Denoiser(folder)
        dispatcher = CorkDispatcher(LATENCY_MS, BATCH, fallback=lambda: None, get_batch_size=len)
        self.together = dispatcher(self.denoise_together)

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=LATENCY_MS)
    def images(self, images: np.ndarray) -> np.ndarray:
        """Reconstruct arrays in JSON."""
        return self.reconstruct(images)

    @bentoml.api
    async def picture(self, image: Image, level: float) -> Image:
        """Denoise a PNG."""
        noisy = np.asarray(image.convert("L"), np.float32) / np.float32(255.0)
        (restored,) = await self.together([(noisy, level)])
        answer = fromarray(np.rint(np.clip(restored, 0.0, 1.0) * 255.0).astype(np.uint8))
        answer.format = "PNG"
        return answer

    async def denoise_together(self, requests: Any) -> list[Any]:
        """Run a batch of pictures of several requests, off the event loop."""
        noisy, levels = zip(*(one for request in requests for one in request), strict=True)
        restored = await asyncio.to_thread(self.denoise, np.stack(noisy), np.array(levels, np.float32))
        return list(restored)


if __name__ == "__main__":
    folder, port = sys.argv[1:]
    command = [sys.executable, "-m", "bentoml", "serve", "benchmarks.peers.bentoml:Vae"]
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": f"{folder}/.bentoml"}
    os.execve(  # noqa: S606  # no shell wanted
        sys.executable,
        [*command, "--host", "127.0.0.1", "--port", port, "--timeout", "30", "-q"],
        os.environ | quiet | {"BENCH_FOLDER": folder},
    )
