"""FastAPI as its tutorial writes it: a pydantic model with lists of numbers, a sync handler, uvicorn."""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.peers.model import Model


class Images(BaseModel):
    """Request and answer: one list of 784 numbers an image."""

    images: list[list[float]]


def main(folder: str, port: int) -> None:
    """Serve reconstruct of JSON."""
    app, model = FastAPI(), Model(folder)

    @app.post("/reconstruct")
    def reconstruct(request: Images) -> Images:
        return Images(images=model(request.images).reshape(-1, 784).tolist())

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
