"""Run a Python module in a process of its own, for a limited time. `service.process` has its further limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
"""Each thread of numpy's and each arena of malloc's reserves address space, which counts as memory here."""


class TookTooLong(Exception):
    """The process did not end in time, and was killed."""


class Killed(Exception):
    """The process ended by a signal, or with another exit status than 0; the message names it."""


def run_module(module: str, argument: str, limit_s: float, heard: Callable[[bytes], None]) -> bytes:
    """Run `python -m module <process id of the parent> argument`, which inherits no file or socket.

    Args:
        module: Name of the module.
        argument: Its argument.
        limit_s: Limit on its time, in seconds.
        heard: Takes each line that it writes to standard output, but the last.

    Returns:
        The last line.

    Raises:
        TookTooLong: Its time was up.
        Killed: It ended by a signal, or with another exit status than 0.
    """
    # It imports from the same places as this process, and never from the working directory (-P).
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100  # "" is the current folder
    command = [sys.executable, "-P", "-m", module, str(os.getpid()), argument]
    late, answer = threading.Event(), b""
    with subprocess.Popen(  # noqa: S603  # our own interpreter and module
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
    ) as process:

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit_s, end)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if answer:
                    heard(answer)
                answer = line
            process.wait()
        finally:
            timer.cancel()
            process.kill()
    if late.is_set():
        raise TookTooLong
    if process.returncode:
        how = -process.returncode
        raise Killed(signal.Signals(how).name if how > 0 else f"exit status {process.returncode}")
    return answer
