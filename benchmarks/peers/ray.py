"""Ray Serve: `@serve.batch` of at most 64 within 1 ms, one replica."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import numpy as np
import orjson
import ray  # after the lines above
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.peers.model import Model


@serve.deployment(num_replicas=1, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.1})
class Reconstruct:
    """Deployment of one replica behind the HTTP proxy."""

    def __init__(self, folder: str) -> None:
        self.model = Model(folder)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.001)
    async def rows(self, images: list[Any]) -> list[Any]:
        """Run a batch of arrays of several requests."""
        answers = self.model(np.concatenate(images))
        return np.split(answers, np.cumsum([len(one) for one in images])[:-1])

    async def __call__(self, request: Request) -> Response:
        """Answer one request of JSON or raw float32."""
        body = await request.body()
        if request.url.path == "/raw":
            answer = await self.rows(np.frombuffer(body, "<f4").reshape(-1, 1, 28, 28))
            return Response(answer.tobytes())
        answer = await self.rows(np.array(orjson.loads(body)["images"], np.float32))
        return Response(orjson.dumps({"images": answer}, option=orjson.OPT_SERIALIZE_NUMPY))


if __name__ == "__main__":
    ray.init(
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        log_to_driver=False,
        num_cpus=2,
        object_store_memory=2**28,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2]), "access_log": False})
    deployment: Any = Reconstruct
    serve.run(deployment.bind(sys.argv[1]), logging_config={"enable_access_log": False, "log_level": "WARNING"})
    while True:
        time.sleep(60)
