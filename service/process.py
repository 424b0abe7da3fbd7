"""Process-wide switches: garbage collection, memory, threads, signals, standard streams, logging and limits.

Imports nothing of the service, so that every package may call it. Linux has all of these switches; where another system
lacks one, that function does nothing.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import gc
import logging
import os
import resource
import signal
import stat
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

SWITCH_INTERVAL_S = 3e-4
"""Python's default of 5 ms leaves the event loop idle for a fifth of the time while another thread computes."""
M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES = -3, 2**21
M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES = -1, 2**24
PR_SET_PDEATHSIG = 1
STANDARD = (1, 2)
"""File descriptors of standard output and standard error."""
HIGHEST_OOM_SCORE = "1000"
"""When memory runs out, the kernel kills this process before the one that serves."""
MIN_FREE_BYTES = 256 * 2**20
"""Lower bound on free memory: the kernel counts some caches as used that it can release."""
STACK_BYTES = 8 * 2**20
"""Address space of a thread's stack where the system sets no limit."""


def freeze_garbage() -> None:
    """Collect garbage once and exempt all remaining objects from later collections.

    Objects made at the start live as long as the process. Scanning them pauses every request, and writes to memory
    pages that forked workers share.
    """
    gc.collect()
    gc.freeze()


def shorten_switch_interval() -> None:
    """Let the event loop take the interpreter lock from a computing thread sooner."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def fix_mmap_threshold() -> None:
    """Make glibc return every freed block above 2 MiB to the system.

    By default glibc raises this threshold with each large block that is freed, up to 32 MiB, and then keeps the memory
    of one large request body. It raises the trim threshold with it, which a fixed one leaves at 128 KiB: then every
    request of some hundred kilobytes gives its memory back and takes fresh pages for the next one, which costs up to a
    third of its time. So up to 16 MiB at the end of the heap are kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)


def trim_heap() -> None:
    """Return freed memory to the system. Closed sessions leave it in small pieces, which glibc otherwise keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def disable_onnxruntime_telemetry() -> None:
    """Keep onnxruntime from reporting names of models and graphs to its maker. Call before onnxruntime is imported."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def omit_log_origin() -> None:
    """Create log records without file, line, thread and process, which halves their cost.

    Source: "Optimization" in Python's Logging HOWTO, which names these attributes.
    """
    logging._srcfile = None  # noqa: SLF001
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def dump_stacks_on(number: signal.Signals) -> None:
    """Write the stacks of all threads to standard error on this signal and on a crash, without the interpreter."""
    faulthandler.enable(2)
    faulthandler.register(number, 2)


def prepare_standard_streams() -> None:
    """Make sure that standard input, output and error are open, and that writing to them never blocks.

    If one is closed, the next socket would get its number, and a caller would receive the log. A write for which the
    reader of a pipe, socket or terminal has no room fails at once, even from a C library. Pipes and terminals are
    reopened for this, since the flag is shared by all programs that have the same one open.
    """
    for descriptor in (0, *STANDARD):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for descriptor in STANDARD:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(mode):
            os.set_blocking(descriptor, False)
        elif stat.S_ISFIFO(mode) or os.isatty(descriptor):
            _reopen_nonblocking(descriptor)


def _reopen_nonblocking(descriptor: int) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND)
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", flags | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # it belongs to another user, or there is no /proc
        os.set_blocking(descriptor, False)
        return
    os.dup2(own, descriptor)
    os.close(own)


def block_signals(numbers: Iterable[signal.Signals]) -> None:
    """Hold these signals back until `unblock_signals`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


def unblock_signals(numbers: Iterable[signal.Signals]) -> None:
    """Deliver these signals, including those held back since `block_signals`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends.

    Args:
        parent: Process id of the parent, read with `os.getpid` in the parent.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call above
        os._exit(1)


def disable_core_dumps() -> None:
    """Write no core file on a crash."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_memory(max_bytes: int, threads: int = 0) -> None:
    """Limit the memory that this process may allocate from now on, also to what is free.

    Args:
        max_bytes: Upper bound, in bytes.
        threads: Threads that the process will start. Their stacks reserve address space that they hardly use, so it is
            added to the limit.
    """
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(HIGHEST_OOM_SCORE)
    with suppress(OSError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
        stacks = threads * (STACK_BYTES if stack == resource.RLIM_INFINITY else stack)
        limit = used + min(max_bytes, max(MIN_FREE_BYTES, free_bytes())) + stacks
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def forbid_files() -> None:
    """Open no further file or socket, and leave the working directory for one that no longer exists."""
    with suppress(OSError), tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def free_bytes(root: Path = Path("/")) -> int:
    """Free memory in bytes: of the machine, or of the container's cgroup (v1 or v2) where that is less."""
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
            used = int((cgroup / usage).read_text()) - cached
            free = min(free, max(0, int((cgroup / limit).read_text()) - used))
    return free
