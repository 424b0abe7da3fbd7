"""The least that can serve a model: a bare ASGI function around onnxruntime, no framework, no batching, no checks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from service import manifest
from service.session import Session


def main(folder: str, port: int) -> None:
    """Serve reconstruct of raw float32 rows."""
    model = manifest.read(Path(folder))
    encoder, decoder = (
        Session((Path(folder) / model.graphs[name].file).read_bytes(), "CPUExecutionProvider", 1)
        for name in ("encoder", "decoder")
    )

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = (await receive())["body"]
        (images,) = decoder(encoder(np.frombuffer(body, "<f4").reshape(-1, *model.input_shape))[0])
        content = images.tobytes()
        headers = [(b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    uvicorn.run(app, port=port, log_level="warning", access_log=False, lifespan="off")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
