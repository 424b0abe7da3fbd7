"""`python -m service`, also installed as `vae-serve`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from typing import Any

import uvicorn
from uvicorn.supervisors import Multiprocess

from service.app import create_app, open_repository
from service.config import Settings, read_settings
from service.errors import StartError
from service.telemetry import SHARED_FOLDER

BACKLOG = 2048


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped; 1 with one line where that cannot begin."""
    # Until uvicorn listens to it, and after: a container's first process ignores signals it has no handler for.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
        listener = bind(settings)
        repository = open_repository(settings)
        listener.listen(BACKLOG)  # not before: a balancer would let requests wait here instead of asking another
    except StartError as error:
        print(f"vae-serve: {error}", file=sys.stderr)
        return 1
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104  # an address one can type
    print(welcome(f"http://{shown}:{port}", list(repository.models)), flush=True)
    if settings.workers > 1:
        del repository  # it was opened to see that it can be; every worker opens its own
        supervise(settings, listener)
    else:
        uvicorn.Server(server_config(settings, create_app(settings, repository))).run([listener])
    return 0


def server_config(settings: Settings, app: Any, **more: Any) -> uvicorn.Config:
    """How uvicorn serves, in one process or in several."""
    return uvicorn.Config(
        app,
        log_level="info",
        access_log=settings.access_log,
        server_header=False,
        timeout_graceful_shutdown=round(settings.timeout_s),
        **more,
    )


def supervise(settings: Settings, listener: socket.socket) -> None:
    """Serve in several processes on one port; one that dies is replaced. Their metrics are added up in a folder."""
    with tempfile.TemporaryDirectory(prefix="vae-metrics-") as folder:
        os.environ |= settings.to_environment() | {SHARED_FOLDER: folder}
        config = server_config(settings, "service.app:create_worker_app", factory=True, workers=settings.workers)
        Multiprocess(config, [listener]).run()


def bind(settings: Settings) -> socket.socket:
    """The port, taken before the models are opened, so that a taken one is told at once.

    Raises: StartError.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); set VAE_PORT or VAE_HOST"
        ) from error
    return listener


def welcome(url: str, models: list[str]) -> str:
    """What to try first."""
    return (
        f"serving {', '.join(models)} on {url}   (documentation: {url}/docs)\n"
        f"try: curl -s -X POST '{url}/v1/sample?count=16&seed=7' -H 'Accept: image/png' -o digits.png"
    )


if __name__ == "__main__":
    sys.exit(main())
