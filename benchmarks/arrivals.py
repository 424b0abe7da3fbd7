"""Open-loop load: requests arrive by a Poisson process, whether or not the server has answered the earlier ones.

The client is one thread, and tells what it adds itself: it notes when a request was sent, and the kernel when it
received the answer. Between the two is the time of the server.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.bodies import Body
from benchmarks.measure import Measure

CONNECTIONS, MAX_CONNECTIONS = 64, 1024
DEADLINE_S = 1.0
"""Latest useful answer after its request was due; a later one counts as failed."""
SO_TIMESTAMPNS = 35
"""Socket option of Linux, which Python does not name: the kernel tells when it received what is read."""
STAMP = struct.Struct("@qq")
CHUNK, NOTES = 1 << 18, 64
"""Bytes of a read, and of the notes that come with it."""


def run(ports: int | Sequence[int], body: Body, rate: float, seconds: float, *, even: bool = False) -> Measure:
    """Offer `rate` requests a second; latency counts from when a request was due, not from when it could be sent.

    Args:
        ports: Of the server; of several replicas, each request goes to one of them at random.
        body: The request.
        rate: Requests a second, of all replicas together.
        seconds: Duration.
        even: Whether requests come at equal distances instead of at random.
    """
    told = body._replace(headers={**body.headers, "x-timeout-ms": str(round(DEADLINE_S * 1000))})
    load = _Load([ports] if isinstance(ports, int) else ports, told.wire(), rate, seconds, even=even)
    try:
        with exact_timer():
            return load.run()
    finally:
        load.close()


@contextmanager
def exact_timer() -> Iterator[None]:
    """Make the kernel end this thread's waits in time; by default it delays them by 50 us, to save power."""
    slack = Path(f"/proc/{threading.get_native_id()}/timerslack_ns")
    slack.write_text("1")
    try:
        yield
    finally:
        slack.write_text("0")  # the default


class _Connection:
    """A connection with one request at a time; it finds the end of an answer without parsing it."""

    def __init__(self, port: int) -> None:
        self.port, self.unsent = port, memoryview(b"")
        self.due, self.sent, self.head, self.missing = 0.0, 0.0, b"", 0
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self.socket.connect_ex(("127.0.0.1", port))

    def begin(self, due: float, wire: bytes) -> None:
        self.due, self.sent, self.unsent = due, time.time(), memoryview(wire)
        self.head, self.missing = b"", -1

    def write(self) -> None:
        """Send what the socket takes."""
        with suppress(BlockingIOError):
            self.unsent = self.unsent[self.socket.send(self.unsent) :]

    def read(self) -> float:
        """Read what has come: when the kernel received the end of the answer, 0 where some of it is missing.

        Raises:
            OSError: The server has closed the connection.
        """
        data, notes, _, _ = self.socket.recvmsg(CHUNK, NOTES)
        if not data:
            raise ConnectionResetError
        if self.missing < 0:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return 0.0
            length = int(self.head[:end].lower().split(b"\r\ncontent-length:")[1].split(b"\r\n")[0])
            self.missing = length - (len(self.head) - end - 4)
        else:
            self.missing -= len(data)
        return 0.0 if self.missing else received(notes)


def received(notes: Sequence[tuple[int, int, bytes]]) -> float:
    """Seconds since 1970 at which the kernel received the data; now, where it has not noted them."""
    for _, kind, content in notes:
        if kind == SO_TIMESTAMPNS:
            whole, nanoseconds = STAMP.unpack(content)
            return float(whole + 1e-9 * nanoseconds) or time.time()
    return time.time()


class _Answer(NamedTuple):
    """An answer: its status, and when it was due, sent, received by the kernel, and read."""

    status: int
    due: float
    sent: float
    received: float
    read: float

    @property
    def good(self) -> bool:
        return self.status == 200 and self.read - self.due <= DEADLINE_S


class _Load:
    def __init__(self, ports: Sequence[int], wire: bytes, rate: float, seconds: float, *, even: bool) -> None:
        self.wire = wire
        generator, number = np.random.default_rng(0), max(1, int(rate * seconds))
        gaps = np.ones(number) if even else generator.exponential(1.0 / rate, number)
        self.due = (np.cumsum(gaps) * (number / rate / gaps.sum())).tolist()  # at that rate exactly
        self.ports = generator.choice(ports, number).tolist()
        self.poll = select.epoll()
        self.idle: dict[int, list[_Connection]] = {port: [] for port in ports}
        self.connections: dict[int, _Connection] = {}
        self.answers: list[_Answer] = []

    def run(self) -> Measure:
        for k in range(CONNECTIONS):
            port = list(self.idle)[k % len(self.idle)]
            self.idle[port].append(self._open(port))
        started = time.time() + 0.05
        for offset, port in zip(self.due, self.ports, strict=True):
            self._read_until(started + offset)
            self._send(started + offset, port)
        self._read_until(started + self.due[-1] + DEADLINE_S)
        return self._measure(started + self.due[-1])

    def close(self) -> None:
        for connection in self.connections.values():
            connection.socket.close()
        self.poll.close()

    def _open(self, port: int) -> _Connection:
        connection = _Connection(port)
        number = connection.socket.fileno()
        self.connections[number] = connection
        self.poll.register(number, select.EPOLLIN)
        return connection

    def _send(self, due: float, port: int) -> None:
        idle = self.idle[port]
        if not idle and len(self.connections) >= MAX_CONNECTIONS:
            return
        connection = idle.pop() if idle else self._open(port)
        connection.begin(due, self.wire)
        with self._dropping(connection):
            connection.write()
            if connection.unsent:
                self.poll.modify(connection.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _read_until(self, moment: float) -> None:
        """Read answers until a moment, and at least once. `select` waits to the microsecond, epoll to a millisecond."""
        while True:
            wait = max(0.0, moment - time.time())
            if not select.select([self.poll], [], [], wait)[0]:
                return
            for number, events in self.poll.poll(0):
                self._serve(self.connections[number], events)
            if not wait:
                return

    def _serve(self, connection: _Connection, events: int) -> None:
        with self._dropping(connection):
            if events & select.EPOLLOUT:
                connection.write()
                if not connection.unsent:
                    self.poll.modify(connection.socket.fileno(), select.EPOLLIN)
            if events & ~select.EPOLLOUT:
                came = connection.read()
                if came:
                    status = int(connection.head[9:12])
                    self.answers.append(_Answer(status, connection.due, connection.sent, came, time.time()))
                    self.idle[connection.port].append(connection)

    @contextmanager
    def _dropping(self, connection: _Connection) -> Iterator[None]:
        """Forget a connection that the server has closed; its request, if any, has no answer."""
        try:
            yield
        except OSError:
            del self.connections[connection.socket.fileno()]
            connection.socket.close()
            with suppress(ValueError):
                self.idle[connection.port].remove(connection)

    def _measure(self, end: float) -> Measure:
        good = [one for one in self.answers if one.good]
        late = [one.read - one.due for one in good]
        served = [one.received - one.sent for one in good]
        refused = [one.read - one.due for one in self.answers if one.status == 503]
        span = self.due[-1]
        # What a server finishes after the last arrival is its backlog, not a rate that it can keep.
        kept = sum(one.read <= end for one in good)
        return Measure(
            kept / span,
            percentile_ms(late, 50),
            percentile_ms(late, 99),
            failures=len(self.due) - len(good) - len(refused),
            offered=len(self.due) / span,
            refused=len(refused),
            refused_p99_ms=percentile_ms(refused, 99),
            served_p50_ms=percentile_ms(served, 50),
            served_p99_ms=percentile_ms(served, 99),
        )


def percentile_ms(seconds: list[float], percent: float) -> float:
    """Percentile in milliseconds; 0 without values."""
    return float(np.percentile(seconds, percent) * 1e3) if seconds else 0.0
