"""The client against the real service, and against a real server that misbehaves as it is told."""

from __future__ import annotations

import asyncio
import os
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from service.app import create_app
from service.settings import Settings
from tests.service.conftest import serving
from vae_client import AsyncClient, Client
from vae_client.client import KEY_VARIABLE, URL_VARIABLE

ROOT = Path(__file__).parents[2]
DIGIT, NOISY = ROOT / "examples" / "digit.png", ROOT / "examples" / "noisy.png"
SHIPPED = {path.parent.parent.name for path in (ROOT / "models").glob("*/*/manifest.json")}
"""Names of the models that come with the project."""
KINDS = ("sync", "async")


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Where the shipped models are served."""
    settings = Settings(models=ROOT / "models", default_model="mnist", threads=1, model_control="anonymous")
    with serving(create_app(settings)) as url:
        yield url


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[Client]:
    """A client of the shipped models."""
    with Client(address) as client:
        yield client


@pytest.fixture(scope="session")
def noisy(client: Client) -> np.ndarray:
    """Three noisy digits whose grey levels are whole 255ths."""
    clean = client.sample(count=3, seed=11).images
    noise = 0.25 * np.random.default_rng(0).standard_normal(clean.shape)
    return (np.rint(np.clip(clean + noise, 0, 1) * 255) / 255).astype(np.float32)


@pytest.fixture
def folder(noisy: np.ndarray, tmp_path: Path) -> Path:
    """A folder of ten noisy pictures, one in a folder of its own."""
    place = tmp_path / "pictures"
    (place / "more").mkdir(parents=True)
    for number in range(10):
        name = f"more/{number}.png" if number == 9 else f"{number}.png"
        Image.fromarray(np.rint(np.roll(noisy[number % 3, 0], number, 0) * 255).astype(np.uint8)).save(place / name)
    return place


def ask(kind: str, url: str, call: Callable[[Any], Any], **arguments: Any) -> Any:
    """What a client of a kind answers to a call, or raises."""
    if kind == "sync":
        with Client(url, **arguments) as client:
            return call(client)

    async def run() -> Any:
        async with AsyncClient(url, **arguments) as client:
            return await call(client)

    return asyncio.run(run())


def events_of(kind: str, url: str, call: Callable[[Any], Any], **arguments: Any) -> list[Any]:
    """The events of a stream of a client of a kind."""
    if kind == "sync":
        with Client(url, **arguments) as client:
            return list(call(client.stream))

    async def run() -> list[Any]:
        async with AsyncClient(url, **arguments) as client:
            return [event async for event in call(client.stream)]

    return asyncio.run(run())


class Counted:
    """The real application, with every operation held up a little and counted."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.forget()

    def forget(self, pause_s: float = 0.05) -> None:
        """Begin anew."""
        self.pause_s = pause_s
        self.total = self.running = self.most = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self.total += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.pause_s)
            await self._app(scope, receive, send)
        finally:
            self.running -= 1


@pytest.fixture(scope="session")
def _counting() -> Iterator[tuple[Counted, str]]:
    settings = Settings(
        models=ROOT / "models", default_model="mnist", versions="mnist:latest,mnist-2d:latest", threads=1
    )
    app = Counted(create_app(settings))
    with serving(app) as url:  # type: ignore[arg-type]  # it is one for uvicorn
        yield app, url


@pytest.fixture
def counted(_counting: tuple[Counted, str]) -> tuple[Counted, str]:
    """The shipped models, behind a counter, and their address."""
    _counting[0].forget()
    return _counting


class Done(NamedTuple):
    """What a command of `vae` did."""

    status: int
    out: str
    err: str
    raw: bytes


def environment(**variables: str) -> dict[str, str]:
    """The environment of a command, with this tree's client and service before all others."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VAE_")}
    return {**clean, "PYTHONPATH": f"{ROOT / 'client'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", **variables}


def vae(*words: str | Path, url: str = "", given: bytes = b"", cwd: Path | None = None, **variables: str) -> Done:
    """Run `vae`; no command may end with a traceback."""
    variables = {**({URL_VARIABLE: url} if url else {}), **variables}
    done = subprocess.run(
        [sys.executable, "-m", "vae_client", *map(str, words)], env=environment(**variables), cwd=cwd, input=given,
        capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    found = Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(), done.stdout)
    assert "Traceback" not in found.err, found.err
    return found


class Answering(NamedTuple):
    """A server that answers as it was told, and what it saw.

    Attributes:
        url: Its address.
        seen: (seconds by a clock, path, headers) of every request.
    """

    url: str
    seen: list[tuple[float, str, dict[str, str]]]


Behaviour = Callable[[BaseHTTPRequestHandler], None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that leave are no errors here."""


@contextmanager
def answering(behaviours: Sequence[Behaviour], context: ssl.SSLContext | None = None) -> Iterator[Answering]:
    """Serve on loopback: each request meets the next of the behaviours, and the last one stays; with a context TLS."""
    seen: list[tuple[float, str, dict[str, str]]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            with lock:
                behaviour = behaviours[min(len(seen), len(behaviours) - 1)]
                seen.append((time.monotonic(), self.path, {name.lower(): text for name, text in self.headers.items()}))
            behaviour(self)

        do_GET = do_POST = answer  # noqa: N815  # http.server's names

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server: socketserver.TCPServer = _Server(("127.0.0.1", 0), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Answering(f"{'http' if context is None else 'https'}://127.0.0.1:{server.server_address[1]}", seen)  # type: ignore[str-bytes-safe]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(
    status: int, content: bytes, media_type: str = "application/json", length: int | None = None, **headers: str
) -> Behaviour:
    """A behaviour: an answer, whose announced length may be longer than it is, so that it breaks off."""

    def behave(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("content-type", media_type)
        handler.send_header("content-length", str(len(content) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)
        if length is not None:
            handler.close_connection = True

    return behave


def drop(handler: BaseHTTPRequestHandler) -> None:
    """A behaviour: close the connection without an answer."""
    handler.close_connection = True


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the environment says which service to ask."""
    for name in (URL_VARIABLE, KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
