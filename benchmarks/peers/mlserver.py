"""MLServer: adaptive batching of at most 64 within 1 ms; no parallel workers, because they add a hop."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
import uvloop
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.peers.model import Model


class Reconstruct(MLModel):
    """Runtime that reconstructs images."""

    async def load(self) -> bool:
        """Open the graphs."""
        assert self.settings.parameters is not None
        self._model = Model(str(self.settings.parameters.uri))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run one batch."""
        answer = self._model(NumpyCodec.decode_input(payload.inputs[0])).astype(np.float32)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("x_mean", answer)])


async def main(folder: str, port: int) -> None:
    """Serve reconstruct by the Open Inference Protocol."""
    settings = Settings(
        host="127.0.0.1", http_port=port, grpc_port=port + 1, metrics_port=port + 2, parallel_workers=0, debug=False
    )
    model = ModelSettings(
        name="vae",
        implementation="benchmarks.peers.mlserver.Reconstruct",
        max_batch_size=64,
        max_batch_time=0.001,
        parameters=ModelParameters(uri=folder),
    )
    await MLServer(settings).start([model])


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
