"""A service on this machine, for the length of a block: the one that is installed in the same environment."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from vae_client.errors import StartFailed

DISTRIBUTION = "vae-service"
MODELS = "share/vae-service/models/"
"""Where the models of the wheel are installed, below the environment's folder."""
INSTALL = "pip install . ./client in the project's folder"
OWN = ("--host=127.0.0.1", "--port=0", "--unix-socket=", "--api-keys=", "--tls-certificate=", "--tls-key=")
"""Settings of the local service; all others come from the environment."""
FURTHER = ("--root-path=", "--workers=1", "--drain-s=0", "--log-format=text")
STOP_S = 10.0
DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


@contextmanager
def started(models: str | os.PathLike[str] | None = None) -> Iterator[str]:
    """Start `python -m service` on a free port of the loopback interface, and end it with the block.

    Args:
        models: Its model repository; None is the models of the installed wheel.

    Yields:
        Its address.

    Raises:
        StartFailed: It is not installed, has no models, or does not start.
    """
    folder = included_models() if models is None else Path(models)
    command = [sys.executable, "-P", "-m", "service", f"--models={folder}", *OWN, *FURTHER]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(  # noqa: S603  # the service of this environment
            command,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509
        )
        try:
            assert process.stdout is not None
            found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
            if found is None:
                process.wait(STOP_S)
                said.seek(0)
                raise StartFailed(_why(said.read()))
            yield found.group()
        finally:
            process.terminate()
            try:
                process.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _why(said: str) -> str:
    """The message for a service that did not start."""
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    if "No module named" in last:
        return f"the service is not installed beside this client; {INSTALL}, or name an address with --url"
    return f"the service does not start: {last.removeprefix('vae-serve: ')}"


def included_models() -> Path:
    """The folder of the models that the installed wheel of the service brought.

    Raises:
        StartFailed: There is none.
    """
    try:
        installed = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise StartFailed(
            f"the service is not installed beside this client; {INSTALL}, or name an address with --url"
        ) from error
    for file in installed.files or ():
        before, found, _ = file.as_posix().partition(MODELS)
        if found:
            return Path(str(installed.locate_file(before + found))).resolve()
    raise StartFailed("the installed service brought no models, as one that is installed --editable; name --models")


def _end_with_parent() -> None:
    """Have the kernel end the service when this process ends, however it ends."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
