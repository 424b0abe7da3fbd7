"""Run a Python module in a process of its own, for a limited time. `service.process` has its further limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
"""Each thread of numpy's and each arena of malloc's reserves address space, which counts as memory here."""


class TookTooLong(Exception):
    """The process did not end in time, and was killed."""


class Killed(Exception):
    """The process ended by a signal, or with another exit status than 0; the message names it."""


def run_module(module: str, argument: str, limit_s: float) -> bytes:
    """Run `python -m module <process id of the parent> argument`, which inherits no file or socket.

    Args:
        module: Name of the module.
        argument: Its argument.
        limit_s: Limit on its time, in seconds.

    Returns:
        What it writes to standard output.

    Raises:
        TookTooLong: Its time was up.
        Killed: It ended by a signal, or with another exit status than 0.
    """
    # It imports from the same places as this process, and never from the working directory (-P).
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100  # "" is the current folder
    command = [sys.executable, "-P", "-m", module, str(os.getpid()), argument]
    with subprocess.Popen(  # noqa: S603  # our own interpreter and module
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
    ) as process:
        try:
            answer, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            raise TookTooLong from error
        finally:
            process.kill()
    if process.returncode:
        how = -process.returncode
        raise Killed(signal.Signals(how).name if how > 0 else f"exit status {process.returncode}")
    return answer
