"""The supervisor: forks worker processes, checks their event loops, restarts workers that end, and stops them all.

It opens no model and starts no thread, so it stays small and can fork at any time. Each worker's event loop writes the
time into shared memory. The supervisor detects a blocked loop by its old time, even if no thread of that worker runs.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from prometheus_client import CollectorRegistry

from service import process
from service.errors import StartError
from service.observability import metrics as telemetry
from service.observability.logs import outputs
from service.observability.shared_values import SharedValues
from service.server import worker
from service.server.listeners import Listener
from service.settings import Settings

FIRST_BACKOFF_S, MOST_BACKOFF_S = 0.1, 10.0
"""Wait before a worker is restarted; doubled each time that it ends within HEALTHY_S."""
HEALTHY_S = 60.0
"""After a worker has run this long, its next restart waits FIRST_BACKOFF_S again."""
GRACE_S = 3.0
"""Added to VAE_TIMEOUT_S: how long workers may take to end after the first signal."""
SHORT_GRACE_S = 2.0
"""How long they may take after the second signal."""
DUMP_S = 0.5
"""How long a worker with a blocked event loop may take to write its stacks before it is killed."""
ANSWER_BYTES = 2**16
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = logging.getLogger("service")


class Worker:
    """A slot for one worker: its current process, and when the next one starts."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.pid = 0
        self.channel: socket.socket | None = None
        self.serves = False
        self.reason = ""
        self.started = self.start_at = self.kill_at = 0.0
        self.failures = 0

    @property
    def runs(self) -> bool:
        """Whether a process runs in this slot."""
        return self.pid != 0


class Supervisor:
    """Runs `settings.workers` workers on bound listeners until a signal stops it. Made before the first fork.

    Args:
        settings: The settings, with the folder of the models and the default models resolved.
        create_app: Makes the application, in a worker.
        listeners: Bound sockets that do not accept connections yet.
        welcome: Called with the names of the models when the first worker is ready.
        shared_folder: Folder of all workers; None where there is one worker.
    """

    def __init__(
        self,
        settings: Settings,
        create_app: worker.CreateApp,
        listeners: list[Listener],
        welcome: Callable[[list[str]], None],
        shared_folder: Path | None,
    ) -> None:
        count = settings.workers
        self._settings, self._create_app, self._shared_folder = settings, create_app, shared_folder
        self._listeners, self._welcome = listeners, welcome
        self._values = SharedValues(count + 1)
        self._several = count > 1
        telemetry.share(self._values, count, several=self._several)
        self._restarts = telemetry.restarts_counter(CollectorRegistry())
        self._beats = memoryview(mmap.mmap(-1, 8 * count)).cast("d")
        self._beat_s = worker.beat_s(settings)
        self._workers = [Worker(slot) for slot in range(count)]
        self._listening = False
        self._signals: list[int] = []
        self._watched = 0.0  # start of the current uninterrupted period of checks
        self._checked = 0.0  # time of the last check

    def run(self) -> None:
        """Run the workers until SIGTERM, SIGINT or SIGHUP, then stop them.

        Raises:
            StartError: The first worker could not open the models.
        """
        process.freeze_garbage()
        with self._signalled() as awake:
            try:
                while not self._signals:
                    self._step(awake)
                self._stop(awake)
            finally:
                for one in self._workers:
                    self._kill(one)

    def _step(self, awake: socket.socket) -> None:
        """Start, hear, reap and check workers, as far as each is due."""
        now = time.monotonic()
        for one in self._workers:
            if not one.runs and now >= one.start_at:
                self._start(one)
        self._wait(awake, self._beat_s)
        for one in self._workers:
            if one.runs and not one.serves:
                self._hear(one)
        for one in self._workers:
            if one.runs:
                self._reap(one)
        self._watch(time.monotonic())

    def _start(self, one: Worker) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)  # required by set_wakeup_fd
        parent = os.getpid()
        for output in outputs():
            output.flush()
        one.started, one.serves, one.reason, one.kill_at = time.monotonic(), False, "", 0.0
        self._beats[one.slot] = 0.0
        pid = os.fork()
        if pid == 0:
            self._become(one, theirs, parent)
        theirs.close()
        one.pid, one.channel = pid, ours

    def _become(self, one: Worker, channel: socket.socket, parent: int) -> NoReturn:
        """Run a worker in the forked process; never returns."""
        try:
            process.end_with_parent(parent)
            signal.set_wakeup_fd(-1)
            for number in STOPPING:
                signal.signal(number, signal.SIG_DFL)
            for other in self._workers:
                if other.channel is not None:
                    other.channel.close()
            telemetry.share(self._values, one.slot, several=self._several)
            beats, slot = self._beats, one.slot

            def beat() -> None:
                beats[slot] = time.monotonic()

            sockets = [listener.socket for listener in self._listeners]
            worker.run(self._settings, self._create_app, sockets, channel, beat, self._shared_folder)
        finally:
            os._exit(1)

    def _hear(self, one: Worker) -> None:
        """Read whether a starting worker is ready.

        Raises:
            StartError: It cannot start, and no worker has started before.
        """
        assert one.channel is not None
        try:
            message = one.channel.recv(ANSWER_BYTES)
        except BlockingIOError:
            return
        if not message:
            return  # it ends
        answer: dict[str, Any] = json.loads(message)
        if "error" in answer:
            one.reason = "not_started"
            if not self._listening:
                raise StartError(answer["error"])
            log.error("worker %d cannot start: %s", one.pid, answer["error"])
            return
        if not self._listening:
            for listener in self._listeners:
                listener.listen()  # not earlier: a balancer would queue requests here instead of sending them elsewhere
            self._listening = True
            self._welcome(answer["models"])
        one.serves = True
        self._beats[one.slot] = time.monotonic()
        with suppress(OSError):  # it has ended
            one.channel.send(worker.GO)

    def _reap(self, one: Worker) -> None:
        """Schedule the restart of a worker that has ended.

        Raises:
            StartError: It was the first worker, and ended before it served.
        """
        pid, status = os.waitpid(one.pid, os.WNOHANG)
        if not pid:
            return
        if one.channel is not None:
            one.channel.close()
        self._values.died(one.slot)
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        one.pid, one.channel = 0, None
        if not self._listening:
            raise StartError(f"the worker process {how} while it opened the models; its log is above")
        now = time.monotonic()
        one.failures = 0 if now - one.started >= HEALTHY_S else one.failures + 1
        delay_s = min(MOST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** max(0, one.failures - 1))
        one.start_at = now + delay_s
        self._restarts.labels(one.reason or ("killed" if code < 0 else "exited")).inc()
        log.error("worker %d %s; it is started again in %.1f s", pid, how, delay_s)

    def _watch(self, now: float) -> None:
        """Kill workers whose event loop is blocked. A break of this process itself does not count against them."""
        limit_s = self._settings.loop_limit_s
        if now - self._checked > max(1.0, 4.0 * self._beat_s):
            self._watched = now
        self._checked = now
        for one in self._workers:
            if not (one.runs and one.serves):
                continue
            if one.kill_at and now >= one.kill_at:
                os.kill(one.pid, signal.SIGKILL)
            elif not one.kill_at and now - max(self._beats[one.slot], self._watched) > limit_s:
                log.critical(
                    "the event loop of worker %d has stood still for more than VAE_LOOP_LIMIT_S (%g); it is killed",
                    one.pid, limit_s,
                )  # fmt: skip
                one.reason, one.kill_at = "stuck", now + DUMP_S
                os.kill(one.pid, worker.DUMP_SIGNAL)

    def _stop(self, awake: socket.socket) -> None:
        """Pass the signal on, wait for the workers to end, and kill those that take too long."""
        settings, sent = self._settings, 0
        end = time.monotonic()
        for listener in self._listeners:
            listener.socket.close()  # the workers keep their copies; this process accepts no more connections
        while True:
            if len(self._signals) > sent:
                gently = sent == 0 and self._signals[0] == signal.SIGTERM
                drain_s = settings.drain_s if gently else 0.0
                grace_s = settings.timeout_s + GRACE_S if sent == 0 else SHORT_GRACE_S
                end, sent = time.monotonic() + drain_s + grace_s, len(self._signals)
                for one in self._workers:
                    if one.runs and one.serves:
                        os.kill(one.pid, signal.SIGTERM if gently else signal.SIGINT)
                    else:
                        self._kill(one)
            for one in self._workers:
                if one.runs and os.waitpid(one.pid, os.WNOHANG)[0]:
                    one.pid = 0
            left_s = end - time.monotonic()
            running = [str(one.pid) for one in self._workers if one.runs]
            if not running:
                return
            if left_s <= 0:
                log.error("worker %s did not stop in time and is killed", ", ".join(running))
                return
            self._wait(awake, min(left_s, self._beat_s))

    def _kill(self, one: Worker) -> None:
        if one.runs:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
            one.pid = 0

    def _wait(self, awake: socket.socket, seconds: float) -> None:
        """Wait until a signal or an answer of a starting worker comes, or the time is up."""
        due = [one.start_at - time.monotonic() for one in self._workers if not one.runs and not self._signals]
        channels = [one.channel for one in self._workers if one.channel is not None and not one.serves]
        readable, _, _ = select.select([awake, *channels], [], [], max(0.0, min([seconds, *due])))
        if awake in readable:
            with suppress(BlockingIOError):
                while awake.recv(ANSWER_BYTES):
                    pass
        for output in outputs():
            output.flush()

    @contextmanager
    def _signalled(self) -> Iterator[socket.socket]:
        """Record signals in `_signals`. Gives a socket that becomes readable with each."""
        awake, waker = socket.socketpair()
        for end in (awake, waker):
            end.setblocking(False)  # required by set_wakeup_fd
        before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGCHLD)}
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        for number in STOPPING:
            signal.signal(number, lambda number, _: self._signals.append(number))
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler the signal does not write to the socket
        try:
            yield awake
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            awake.close()
            waker.close()


def apart(work: Callable[[], str]) -> str:
    """Run `work` in a process of its own, so that threads of libraries do not stay in this one, which must fork.

    Returns:
        What `work` returns.

    Raises:
        StartError: `work` raised it, or its process failed.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            process.end_with_parent(parent)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            try:
                answer = {"result": work()}
            except StartError as error:
                answer = {"error": str(error)}
            theirs.send(json.dumps(answer).encode())
        finally:
            os._exit(0)
    theirs.close()
    try:
        message = ours.recv(ANSWER_BYTES)
    finally:  # a signal may interrupt the wait
        ours.close()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not message:
        raise StartError("the process that fetches the models has failed; its log is above")
    answer = json.loads(message)
    if "error" in answer:
        raise StartError(answer["error"])
    return str(answer["result"])
