"""A bare ASGI function on uvicorn that reads a body and returns the same bytes: the least that HTTP costs here."""

from __future__ import annotations

import sys
from typing import Any

import uvicorn


async def app(_: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer with what was sent."""
    parts = []
    while True:
        message = await receive()
        parts.append(message["body"])
        if not message.get("more_body"):
            break
    body = b"".join(parts)
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False, lifespan="off")
