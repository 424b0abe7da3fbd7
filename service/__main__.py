"""`python -m service`, also installed as `vae-serve`."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
from functools import partial
from logging.config import dictConfig
from typing import Any

import uvicorn
from uvicorn.supervisors import Multiprocess

from service.app import create_app, end_process, open_repository
from service.config import Settings, read_settings
from service.connections import Connections
from service.errors import StartError
from service.exposure import check
from service.logs import Format, log_config
from service.protocol import Protocol
from service.sources import local_copy
from service.telemetry import SHARED_FOLDER

log = logging.getLogger("service")

BACKLOG = 2048


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped; 1 with one line where that cannot begin."""
    # Until uvicorn listens to it, and after: a container's first process ignores signals it has no handler for.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
        check(settings)
    except StartError as error:
        return refuse(error, "text")
    dictConfig(log_config(settings.log_format))
    try:
        serve(settings)
    except StartError as error:
        return refuse(error, settings.log_format)
    return 0


def refuse(error: StartError, form: Format) -> int:
    """Say in one line why it does not start; gives the exit status."""
    if form == "json":
        log.critical("%s", error)
    else:
        print(f"vae-serve: {error}", file=sys.stderr)
    return 1


def serve(settings: Settings) -> None:
    """Listen, open the models, serve until stopped.

    Raises: StartError.
    """
    listeners = [bind(settings, settings.port)]
    if settings.ops_port is not None:
        listeners.append(bind(settings, settings.ops_port))
        settings = settings.model_copy(update={"ops_port": listeners[1].getsockname()[1]})
    settings = settings.model_copy(update={"models": local_copy(settings)})  # fetched once, for all workers
    repository = open_repository(settings)
    for listener in listeners:
        listener.listen(BACKLOG)  # not before: a balancer would let requests wait here instead of asking another
    urls, models = [url_of(settings, listener) for listener in listeners], list(repository.models)
    if settings.log_format == "json":
        log.info("serving %s on %s", ", ".join(models), " and ".join(urls))
    else:
        print(welcome(models, *urls), flush=True)
    if settings.workers > 1:
        del repository  # it was opened to see that it can be; every worker opens its own
        supervise(settings, listeners)
    else:
        uvicorn.Server(server_config(settings, create_app(settings, repository, end_process))).run(listeners)


def server_config(settings: Settings, app: Any, **more: Any) -> uvicorn.Config:
    """How uvicorn serves, in one process or in several."""
    return uvicorn.Config(
        app,
        log_level="info",
        log_config=log_config(settings.log_format),
        access_log=False,  # ours knows the request's id
        http=partial(Protocol, settings=settings, connections=Connections(settings)),  # type: ignore[arg-type]  # which makes one
        ws="none",
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        ssl_certfile=settings.tls_certificate or None,
        ssl_keyfile=settings.tls_key or None,
        server_header=False,
        timeout_graceful_shutdown=round(settings.timeout_s),
        **more,
    )


def supervise(settings: Settings, listeners: list[socket.socket]) -> None:
    """Serve in several processes on the same ports; one that dies is replaced. A folder adds up their metrics."""
    with tempfile.TemporaryDirectory(prefix="vae-metrics-") as folder:
        os.environ |= settings.to_environment() | {SHARED_FOLDER: folder}
        config = server_config(settings, "service.app:create_worker_app", factory=True, workers=settings.workers)
        Multiprocess(config, listeners).run()


def bind(settings: Settings, port: int) -> socket.socket:
    """A port, taken before the models are opened, so that a taken one is told at once.

    Raises: StartError.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, port))
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {settings.host}:{port} ({error.strerror}); set VAE_PORT, VAE_OPS_PORT or VAE_HOST"
        ) from error
    return listener


def url_of(settings: Settings, listener: socket.socket) -> str:
    """What one can type."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104
    return f"{'https' if settings.tls_certificate else 'http'}://{shown}:{port}"


def welcome(models: list[str], url: str, ops_url: str = "") -> str:
    """What to try first."""
    return (
        f"serving {', '.join(models)} on {url}   (documentation: {url}/docs)\n"
        f"try: curl -s -X POST '{url}/v1/sample?count=16&seed=7' -H 'Accept: image/png' -o digits.png"
        + (f"\nhealth and metrics on {ops_url}" if ops_url else "")
    )


if __name__ == "__main__":
    sys.exit(main())
