"""Server processes: start, wait until ready, measure memory and CPU, end with all children."""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path

from benchmarks.bodies import Body

MARK = "BENCH_SERVER"
START_LIMIT_S = 90.0
STOP_LIMIT_S = 8.0
STARTED = "Application startup complete"
"""uvicorn's log line for every worker that is ready."""
TICKS_S = os.sysconf("SC_CLK_TCK")


class StartFailed(Exception):
    """The server did not answer in time; the message is the end of its log."""


class Server:
    """A process on loopback and its descendants, identified by a mark in their environment.

    start_s: seconds from starting the process to its first right answer.
    """

    def __init__(
        self, command: list[str], folder: Path, probe: Body, log: Path, workers: int = 1, tree: Path | None = None
    ) -> None:
        """Start the process and wait for the answer to `probe`, and until every worker is ready.

        Args:
            command: What starts it; the model's folder and the port follow.
            folder: The model version's folder.
            probe: A request that it answers with 200 when it serves.
            log: Where its output goes.
            workers: Processes that serve.
            tree: Where its own packages are imported from; None is the working directory.

        Raises:
            StartFailed: It ended, or did not answer in time.
        """
        self.port, self._mark, self._log, self._workers = _free_port(), uuid.uuid4().hex, log, workers
        home = str((tree or Path()).absolute())
        own = {MARK: self._mark, "PYTHONPATH": home, "OMP_NUM_THREADS": "1", "BENCH_WORKERS": str(workers)}
        environment = {**os.environ, **own}
        started = time.perf_counter()
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [*command, str(folder.absolute()), str(self.port)], env=environment, stdout=file, stderr=file, cwd=home
            )
        try:
            self._await(probe, started + START_LIMIT_S)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.perf_counter() - started

    def ask(self, body: Body, timeout_s: float = 10.0) -> tuple[int, bytes]:
        """Send one request; status and content of the answer.

        Raises: OSError, HTTPException.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request("POST", body.path, body.content, body.headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def memory_mib(self) -> float:
        """Resident memory of all its processes, with shared pages counted once."""
        return sum(_kib(pid, "smaps_rollup", b"Pss:") for pid in self.pids()) / 1024.0

    def peaks_mib(self) -> dict[int, float]:
        """Peak resident memory of each of its processes since `reset_peaks`."""
        return {pid: _kib(pid, "status", b"VmHWM:") / 1024.0 for pid in self.pids()}

    def reset_peaks(self) -> None:
        """Reset every process's peak to its current memory."""
        for pid in self.pids():
            with suppress(OSError):  # it has gone
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def threads(self) -> int:
        """Number of threads of all its processes."""
        return sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in self.pids())

    def descriptors(self) -> int:
        """Number of open files and connections of all its processes."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.pids())

    def cpu_s(self) -> float:
        """CPU time of all its processes, to a hundredth of a second."""
        return sum(map(_cpu_ticks, self.pids())) / TICKS_S

    def pids(self) -> set[int]:
        """Processes with the mark and their children, which may have overwritten the mark."""
        wanted = f"{MARK}={self._mark}".encode()
        everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        found = {pid for pid in everyone if wanted in _read(Path(f"/proc/{pid}/environ")).split(b"\0")}
        parents = {pid: _parent(pid) for pid in everyone}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return set(filter(_alive, found))

    def stop(self) -> None:
        """End the process and all its children: first by a signal, then by force."""
        pids = self.pids()
        self._process.terminate()
        end = time.perf_counter() + STOP_LIMIT_S
        while any(map(_alive, pids)) and time.perf_counter() < end:
            self._process.poll()
            time.sleep(0.05)
        for pid in pids | self.pids():
            _kill(pid)
        self._process.wait()

    def _await(self, probe: Body, end: float) -> None:
        while time.perf_counter() < end:
            if self._process.poll() is not None:
                break
            if self._answers(probe) and self._all_serve():
                return
            time.sleep(0.02)
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise StartFailed(f"no right answer; its log ends: {lines[-1][:200]}")

    def _answers(self, probe: Body) -> bool:
        try:
            return self.ask(probe)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _all_serve(self) -> bool:
        return self._workers == 1 or self._log.read_text(errors="replace").count(STARTED) >= self._workers


def end_when_asked() -> None:
    """Make SIGINT and SIGTERM run the `finally` blocks, which a second signal cannot interrupt."""

    def leave(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        sys.exit(1)

    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs start with it ignored
        signal.signal(number, leave)


def _read(file: Path) -> bytes:
    """Content of a file in /proc; empty if the process has ended."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _stat(pid: int) -> list[bytes]:
    """Fields of a process's stat from the third (its state); empty if it has ended."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _alive(pid: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[0] != b"Z"


def _cpu_ticks(pid: int) -> int:
    """Sum of user and system time."""
    return sum(map(int, _stat(pid)[11:13]))


def _kib(pid: int, file: str, field: bytes) -> int:
    lines = _read(Path(f"/proc/{pid}/{file}")).splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    """A free port of loopback, with the next two free as well: some servers need several.

    Below the ports that connections are given, so that none of the load's own can be in the way.
    """
    while True:
        port = random.randrange(20_000, 30_000)  # noqa: S311  # no secret
        with suppress(OSError), ExitStack() as stack:
            for one in range(port, port + 3):
                stack.enter_context(socket.create_server(("127.0.0.1", one)))
            return port
