"""Command line of the service: `python -m service`, also installed as `vae-serve`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service import process
from service.app import create_app
from service.errors import StartError
from service.observability.logs import FLUSH_S, Format, configure, outputs
from service.repository.defaults import default_models
from service.repository.remote import local_copy
from service.repository.selection import Selection
from service.security.startup_checks import check
from service.server.listeners import Listener, bind
from service.server.supervisor import Supervisor, apart
from service.settings import Settings, forget_kubernetes, read_settings

log = logging.getLogger("service")


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped.

    Returns:
        Exit status: 1, after one line of explanation, if the service cannot start.
    """
    # Until the supervisor has its own handler: the first process of a container ignores signals without one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    process.prepare_standard_streams()
    ignored = forget_kubernetes()
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
        check(settings)
    except StartError as error:
        return refuse(error, "text")
    configure(settings.log_format)
    if ignored:
        log.info("ignored, as Kubernetes sets them for services: %s", ", ".join(ignored))
    try:
        serve(settings)
    except StartError as error:
        return refuse(error, settings.log_format)
    finally:
        for output in outputs():
            output.flush_within(FLUSH_S)
    return 0


def refuse(error: StartError, form: Format) -> int:
    """Write in one line why the service does not start; returns the exit status."""
    line = " ".join(str(error).split())
    if form == "json":
        log.critical("%s", line)
    else:
        with suppress(OSError):
            os.write(2, f"vae-serve: {line}\n".encode(errors="backslashreplace"))
    return 1


def serve(settings: Settings) -> None:
    """Bind the sockets, find the models, and serve until stopped.

    Raises:
        StartError: The service cannot start.
    """
    listeners = bind(settings)
    try:
        if settings.ops_port is not None:
            settings = settings.model_copy(update={"ops_port": listeners[-1].socket.getsockname()[1]})
        settings = resolved(settings)
        with shared_folder(settings) as folder:
            Supervisor(
                settings,
                lambda on_failure: create_app(settings, on_failure=on_failure, shared_folder=folder),
                listeners,
                lambda models: announce(settings, listeners, models),
                folder,
            ).run()
    finally:
        for listener in listeners:
            listener.remove()


def resolved(settings: Settings) -> Settings:
    """Fill in the folder of the models and the default models, so that all workers have the same.

    Raises:
        StartError: The models cannot be fetched, or there is no default model.
    """
    models = settings.models
    if not isinstance(models, Path):
        models = Path(apart(lambda: str(local_copy(settings))))
    defaults = default_models(models, Selection(settings.versions), settings.default_model)
    return settings.model_copy(update={"models": models, "default_model": str(defaults)})


@contextmanager
def shared_folder(settings: Settings) -> Iterator[Path | None]:
    """Make a temporary folder of all workers; None where there is one worker.

    Raises:
        StartError: There is no room for it.
    """
    if settings.workers == 1:
        yield None
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix="vae-service-", ignore_cleanup_errors=True)
    except OSError as error:
        raise StartError(
            f"cannot create a folder for the workers ({error.strerror}); set TMPDIR to a writable one, or "
            "VAE_WORKERS to 1"
        ) from error
    with folder as name:
        yield Path(name)


def announce(settings: Settings, listeners: list[Listener], models: list[str]) -> None:
    """Write that the service accepts requests, and where.

    Raises:
        StartError: Standard output cannot be written.
    """
    if settings.log_format == "json":
        at = " and ".join(listener.url or listener.name for listener in listeners)
        log.info("serving %s on %s", ", ".join(models), at)
        return
    try:
        with suppress(BlockingIOError):  # a full pipe
            print(welcome(models, settings, listeners), flush=True)
    except OSError as error:
        raise StartError(f"cannot write to standard output: {error.strerror}; send it elsewhere") from error


def welcome(models: list[str], settings: Settings, listeners: list[Listener]) -> str:
    """Return the text for standard output: what is served, where, and a first command to try."""
    first, *others = listeners
    curl, url, documentation = "curl -sSf", first.url, f"   (documentation: {first.url}/docs)"
    if first.file is not None:
        curl, url, documentation = f"curl -sSf --unix-socket {first.name}", "http://localhost", ""
    key = ' -H "Authorization: Bearer $KEY"' if settings.api_keys else ""
    lines = [
        f"serving {', '.join(models)} on {first.url or first.name}{documentation}",
        f"try: {curl} -X POST '{url}/v1/sample?count=16&seed=7'{key} -H 'Accept: image/png' -o digits.png",
    ]
    if settings.ops_port is not None:
        lines.append(f"health and metrics on {others.pop().url}")
    return "\n".join([*lines, *(f"also on {other.url}" for other in others)])


if __name__ == "__main__":
    sys.exit(main())
