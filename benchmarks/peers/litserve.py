"""LitServe: batches of at most 64 within 1 ms, one worker, the fast (ZeroMQ) queue."""

import sys
from typing import Any

import litserve
import numpy as np

from benchmarks.peers.model import Model


class Reconstruct(litserve.LitAPI):
    """Reconstruct: one image a request, one model call a batch."""

    folder = ""

    def setup(self, device: str) -> None:  # noqa: ARG002  # LitServe's signature
        """Open the model, in the worker."""
        self.model = Model(self.folder)

    def decode_request(self, request: litserve.Request) -> Any:
        """Decode JSON; LitServe evaluates this annotation, so it must not be a string."""
        return np.array(request["image"], np.float32)

    def batch(self, inputs: list[Any]) -> Any:
        """Stack rows."""
        return np.stack(inputs)

    def predict(self, x: Any) -> Any:
        """Run the model."""
        return self.model(x)

    def unbatch(self, output: Any) -> Any:
        """Split a batch into rows."""
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        """Encode an array as JSON."""
        return {"image": output.ravel().tolist()}


if __name__ == "__main__":
    api = Reconstruct(max_batch_size=64, batch_timeout=0.001)
    api.folder = sys.argv[1]
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        port=int(sys.argv[2]), host="127.0.0.1", num_api_servers=1, log_level="warning", generate_client_file=False
    )
