"""Triton with its Python back end (nvidia-pytriton): the dynamic batcher, at most 256 rows within 1 ms."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.model import Model


def main(folder: str, port: int) -> None:
    """Serve reconstruct by the Open Inference Protocol."""
    model = Model(folder)

    @batch
    def infer(x: Any) -> dict[str, Any]:
        return {"x_mean": model(x)}

    config = TritonConfig(http_address="127.0.0.1", http_port=port, allow_grpc=False, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="vae",
            infer_func=infer,
            inputs=[Tensor(name="x", dtype=np.float32, shape=(1, 28, 28))],
            outputs=[Tensor(name="x_mean", dtype=np.float32, shape=(1, 28, 28))],
            config=ModelConfig(max_batch_size=256, batcher=DynamicBatcher(max_queue_delay_microseconds=1000)),
            strict=False,
        )
        triton.serve()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
