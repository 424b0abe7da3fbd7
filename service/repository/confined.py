"""A Python module run in a process of its own, with limits on time, memory and files: both sides of it."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
FIRST_VICTIM = "1000"
"""Of the kernel, where memory runs out: this process before the one that serves."""
LEAST_BYTES = 256 * 2**20
"""What counts as free at least, since caches may be given up that are counted as taken."""
STACK_BYTES = 8 * 2**20
"""Address space of a thread's stack where the system does not limit it."""
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


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the process that started it ends, however that ends; Linux alone can.

    parent: the number of that process, as `os.getpid` gave it there.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


def leave_no_core() -> None:
    """In the process: write no core file when it crashes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_memory(most_bytes: int, threads: int = 0) -> None:
    """In the process: limit what it may take on top of what it has, also to what is free.

    Args:
        most_bytes: Limit where more is free.
        threads: Threads that it will start; their stacks reserve address space, which they hardly use.
    """
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(FIRST_VICTIM)
    with suppress(OSError):
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
        stacks = threads * (STACK_BYTES if stack == resource.RLIM_INFINITY else stack)
        limit = taken + min(most_bytes, max(LEAST_BYTES, free_bytes())) + stacks
        _, highest = resource.getrlimit(resource.RLIMIT_AS)  # the hard limit, which cannot be raised
        soft = limit if highest == resource.RLIM_INFINITY else min(limit, highest)
        resource.setrlimit(resource.RLIMIT_AS, (soft, highest))


def forbid_files() -> None:
    """In the process: open no file and no socket any more, and stand in an empty folder."""
    with suppress(OSError), tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # which is removed: nothing can be put there
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def free_bytes(root: Path = Path("/")) -> int:
    """Memory that is free, on this machine and in the container's cgroup (v2 or v1)."""
    known = dict(line.split()[:2] for line in (root / "proc/meminfo").read_text().splitlines())
    free = 1024 * int(known["MemAvailable:"])
    cgroup = root / "sys/fs/cgroup"
    for limit, usage, counts in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with suppress(OSError, ValueError, KeyError):  # no such cgroup, or no limit ("max")
            counted = dict(line.split() for line in (cgroup / counts).read_text().splitlines())
            cached = int(counted["inactive_file"]) + int(counted["active_file"])
            taken = int((cgroup / usage).read_text()) - cached
            free = min(free, max(0, int((cgroup / limit).read_text()) - taken))
    return free
