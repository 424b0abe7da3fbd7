"""LitServe: batches of at most 64 within 1 ms, one worker, the fast (ZeroMQ) queue."""

import sys
from typing import Any

import litserve
import numpy as np

from benchmarks.peers.model import Model


class Reconstruct(litserve.LitAPI):
    """One image a request, a batch a call of the model."""

    folder = ""

    def setup(self, device: str) -> None:  # noqa: ARG002  # LitServe's signature
        """Called in the worker."""
        self.model = Model(self.folder)

    def decode_request(self, request: litserve.Request) -> Any:
        """JSON to array; LitServe reads this annotation, so it must not be text."""
        return np.array(request["image"], np.float32)

    def batch(self, inputs: list[Any]) -> Any:
        """Stack."""
        return np.stack(inputs)

    def predict(self, x: Any) -> Any:
        """Run."""
        return self.model(x)

    def unbatch(self, output: Any) -> Any:
        """Row by row."""
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        """Array to JSON."""
        return {"image": output.ravel().tolist()}


if __name__ == "__main__":
    api = Reconstruct(max_batch_size=64, batch_timeout=0.001)
    api.folder = sys.argv[1]
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        port=int(sys.argv[2]), host="127.0.0.1", num_api_servers=1, log_level="warning", generate_client_file=False
    )
