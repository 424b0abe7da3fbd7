"""Minimal server: an ASGI function around onnxruntime, without framework, batching or checks."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import orjson
import uvicorn

from benchmarks.peers.model import Model


def main(folder: str, port: int) -> None:
    """Serve reconstruct of raw float32 rows, or of JSON."""
    model = Model(folder)

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body = body + message["body"] if body else message["body"]
            if not message.get("more_body"):
                break
        if scope["path"] == "/json":
            content = orjson.dumps({"images": model(orjson.loads(body)["images"])}, option=orjson.OPT_SERIALIZE_NUMPY)
        else:
            content = model(np.frombuffer(body, "<f4")).tobytes()
        headers = [(b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    uvicorn.run(app, port=port, log_level="warning", access_log=False, lifespan="off")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
