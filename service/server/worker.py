"""A worker process: opens the models, reports to the supervisor, then serves on inherited sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
from starlette.types import ASGIApp

from service import process
from service.errors import StartError
from service.observability import request_ids
from service.observability.logs import FLUSH_S, outputs
from service.server.application import Application
from service.server.connections import Connections
from service.server.protocol import Protocol, Respond
from service.settings import Settings

DUMP_SIGNAL = signal.SIGQUIT
"""Makes a worker write the stacks of its threads to standard error, even if its interpreter is blocked."""
STOPPING = (signal.SIGTERM, signal.SIGINT)
GO = b"serve"
"""The supervisor's answer to a worker that is ready."""
FRESH_S = 0.5
"""How long a stopping worker keeps a connection without a request, since the request may be on its way."""

log = logging.getLogger("service")


CreateApp = Callable[[Callable[[], None]], Application]
"""Opens the models and makes the application around them; takes a function to call when inference fails for good."""


def run(
    settings: Settings,
    create_app: CreateApp,
    listeners: list[socket.socket],
    channel: socket.socket,
    beat: Callable[[], None],
    shared_folder: Path | None,
) -> NoReturn:
    """Serve until stopped, then end the process.

    Args:
        settings: The settings of the service.
        create_app: Makes the application.
        listeners: Bound sockets.
        channel: Connection to the supervisor.
        beat: Called by the event loop for as long as it runs.
        shared_folder: Folder of all workers; None where there is one worker.
    """
    status = 1
    try:
        process.dump_stacks_on(DUMP_SIGNAL)
        process.block_signals(STOPPING)  # until there are handlers
        process.fix_mmap_threshold()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # handled by the supervisor
        request_ids.renew()
        app = _open(create_app, channel)
        if app is not None and channel.recv(len(GO)) == GO:
            config = server_config(settings, app, app.respond, Connections(settings, shared_folder))
            _serve(Server(config, app, settings, beat), listeners)
            status = 0
    except Exception:
        log.exception("worker %d has failed", os.getpid())
    finally:
        for output in outputs():
            output.flush_within(FLUSH_S)
        os._exit(status)  # a normal exit would wait for blocked threads


def _open(create_app: CreateApp, channel: socket.socket) -> Application | None:
    """Make the application and send the supervisor the names of its models, or the error of its start."""
    try:
        app = create_app(end_process)
    except (StartError, OSError) as error:
        channel.send(json.dumps({"error": _line(error)}).encode())
        return None
    channel.send(json.dumps({"models": list(app.state.repository.models)}).encode())
    return app


def _line(error: Exception) -> str:
    named = isinstance(error, OSError) and error.filename is not None
    return " ".join((f"{error.filename}: {error.strerror}" if named else str(error)).split())  # type: ignore[attr-defined]


def end_process() -> None:
    """Stop this worker as the supervisor would; requests under way are answered if possible."""
    signal.raise_signal(signal.SIGINT)


def server_config(
    settings: Settings, app: ASGIApp, respond: Respond, connections: Connections | None = None, **options: Any
) -> uvicorn.Config:
    """Make uvicorn's configuration.

    Args:
        settings: The settings of the service.
        app: Any ASGI application.
        respond: Gives the response for an error in what a connection sends, by the path of the request.
        connections: Limits on connections; None makes those of the settings, for one worker.
        **options: Further options of uvicorn.
    """
    connections = connections or Connections(settings)
    return uvicorn.Config(
        app,
        log_config=None,  # the parent has configured it
        access_log=False,  # observability.access_log has the request id
        http=partial(Protocol, settings=settings, respond=respond, connections=connections),  # type: ignore[arg-type]
        ws="none",
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        ssl_certfile=settings.tls_certificate or None,
        ssl_keyfile=settings.tls_key or None,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.timeout_s),
        **options,
    )


def _serve(server: Server, listeners: list[socket.socket]) -> None:
    make_loop = server.config.get_loop_factory()
    loop = make_loop() if make_loop else asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(server.serve(listeners))


class Server(uvicorn.Server):
    """uvicorn's server, which accepts requests for `drain_s` after SIGTERM and calls `beat` from its event loop."""

    def __init__(self, config: uvicorn.Config, app: Application, settings: Settings, beat: Callable[[], None]) -> None:
        super().__init__(config)
        config.load()  # now, since a signal may come before it serves
        self._app, self._drain_s, self._beat = app, settings.drain_s, beat
        self._beat_s = beat_s(settings)
        self._close_at: float | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until stopped."""
        beating = asyncio.create_task(self._keep_beating())
        await super().serve(sockets)
        beating.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals: SIGTERM drains, SIGINT stops."""
        signal.signal(signal.SIGTERM, self._drain)
        signal.signal(signal.SIGINT, self._stop)
        process.unblock_signals(STOPPING)
        yield

    def _drain(self, *_: Any) -> None:
        """Turn readiness false, close each connection after its answer, and stop after `drain_s`."""
        if self._close_at is None:
            self._close_at = time.monotonic() + self._drain_s
            self._app.state.stopping = True
            closing = (b"connection", b"close")
            self.config.encoded_headers = [*self.config.encoded_headers, closing]
            self.server_state.default_headers = [*self.server_state.default_headers, closing]

    def _stop(self, *_: Any) -> None:
        self._app.state.stopping = True
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; uvicorn calls it ten times a second."""
        if self._close_at is not None and time.monotonic() >= self._close_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no further connections and answer the requests under way."""
        await asyncio.sleep(0)  # lets the loop accept the connections that wait
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        end = time.monotonic() + FRESH_S
        connections: set[Any] = self.server_state.connections
        while time.monotonic() < end and any(one.cycle is None for one in connections):  # noqa: ASYNC110  # there is no event for it
            await asyncio.sleep(0.01)
        await super().shutdown([])

    async def _keep_beating(self) -> None:
        while True:
            self._beat()
            for output in outputs():
                output.flush()
            await asyncio.sleep(self._beat_s)


def beat_s(settings: Settings) -> float:
    """Return the interval in seconds at which the event loop reports, and the supervisor checks, that it runs."""
    return min(0.5, settings.loop_limit_s / 8)
