"""The service in process, around a model that the trainer has just made."""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.app import create_app
from service.contract.manifest import read
from service.repository.repository import Repository
from service.runtime.model import Model
from service.runtime.session import Session
from service.settings import Settings

Graph = Callable[..., tuple[NDArray[np.float32], ...]]


def strict(app: ASGIApp) -> ASGIApp:
    """The application as a server that pickles its messages takes it, as Ray Serve's replicas do."""

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        def checked(message: Message) -> Awaitable[None]:
            pickle.dumps(message)
            return send(message)

        await app(scope, receive, checked)

    return handle


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve in a thread by a server that is not the service's own; gives the URL, and stops in an orderly way."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(strict(app), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def slow(digits_models: Path) -> Callable[[Callable[[], object]], Repository]:
    """A function that gives the model, whose decoder first does what it is told, with every batch."""

    def repository(think: Callable[[], object]) -> Repository:
        model = Repository.open(digits_models, "", "CPUExecutionProvider", 1, 8).find("digits", None)

        def decoder(z: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
            think()
            return model.graphs["decoder"](z)

        slowed = Model(model.manifest, {**model.graphs, "decoder": decoder})  # type: ignore[dict-item]
        return Repository({"digits": {"1": slowed}}, "digits")

    return repository


@pytest.fixture(scope="session")
def serve() -> Callable[[FastAPI], AbstractContextManager[str]]:
    """A function that serves an application, for a `with` block."""
    return serving


@pytest.fixture(scope="session")
def client(digits_models: Path) -> Iterator[httpx.Client]:
    """A client of the whole application, served by uvicorn on loopback."""
    served = serving(create_app(Settings(models=digits_models, max_rows=8)))
    with served as url, httpx.Client(base_url=url, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="session")
def model(digits_models: Path) -> Model:
    """The model behind the client, opened a second time."""
    return Repository.open(digits_models, "", "CPUExecutionProvider", 1, 8).find("digits", None)


@pytest.fixture(scope="session")
def small(small_models: Path) -> Repository:
    """The same, opened."""
    return Repository.open(small_models, "", "CPUExecutionProvider", 1, 8)


@pytest.fixture(scope="session")
def graphs(digits_models: Path) -> dict[str, Graph]:
    """The model's graphs, run without the service."""
    folder = next((digits_models / "digits").iterdir())
    return {
        name: Session((folder / graph.file).read_bytes(), "CPUExecutionProvider", 1, graph)
        for name, graph in read(folder).graphs.items()
    }


@pytest.fixture(scope="session")
def images() -> NDArray[np.float32]:
    """Three images of the model's size; their grey levels are whole 255ths, so that a PNG holds them exactly."""
    levels = np.random.default_rng(3).integers(0, 256, (3, 1, 8, 8))
    return (levels / 255.0).astype(np.float32)


async def until(true: Callable[[], bool]) -> None:
    """Wait for five seconds at most."""
    for _ in range(5000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError
