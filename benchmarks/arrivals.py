"""Open-loop load: requests arrive by a Poisson process, whether or not the server has answered the earlier ones."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
import uvloop

from benchmarks.bodies import Body
from benchmarks.measure import Measure

MAX_CONNECTIONS = 1024
DEADLINE_S = 1.0
"""Latest useful answer after its request was due; a later one counts as failed."""
SHORT_S = 2e-5
"""A request that is due within this time is sent at once."""


def run(ports: int | Sequence[int], body: Body, rate: float, seconds: float) -> Measure:
    """Offer `rate` requests a second; latency counts from when a request was due, not from when it could be sent.

    Args:
        ports: Of the server; of several replicas, each request goes to one of them at random.
        body: The request.
        rate: Requests a second, of all replicas together.
        seconds: Duration.
    """
    told = body._replace(headers={**body.headers, "x-timeout-ms": str(round(DEADLINE_S * 1000))})
    return uvloop.run(_Load([ports] if isinstance(ports, int) else ports, told.wire(), rate, seconds).run())


class _Load:
    def __init__(self, ports: Sequence[int], wire: bytes, rate: float, seconds: float) -> None:
        self.wire, self.seconds = wire, seconds
        generator = np.random.default_rng(0)
        gaps = generator.exponential(1.0 / rate, max(1, int(rate * seconds)))
        self.due = (np.cumsum(gaps) * (len(gaps) / rate / gaps.sum())).tolist()  # at that rate exactly
        self.ports = generator.choice(ports, len(gaps)).tolist()
        self.alarm = asyncio.Event()
        self.idle: dict[int, list[_Connection]] = {port: [] for port in ports}
        self.connections: list[_Connection] = []
        self.answers: list[tuple[int, float, float]] = []

    async def run(self) -> Measure:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGALRM, self.alarm.set)
        for k in range(64):
            await self._open(list(self.idle)[k % len(self.idle)])
        started = loop.time() + 0.05
        self.end = started + self.due[-1]
        for offset, port in zip(self.due, self.ports, strict=True):
            await asyncio.sleep(0)
            await self._until(started + offset)
            await self._send(started + offset, port)
        await asyncio.sleep(DEADLINE_S)
        for connection in self.connections:
            connection.transport.abort()
        return self._measure()

    async def _until(self, moment: float) -> None:
        """Wait by the system's timer, because the event loop's is a millisecond coarse and polling takes a core."""
        wait = moment - asyncio.get_running_loop().time()
        if wait > SHORT_S:
            self.alarm.clear()
            signal.setitimer(signal.ITIMER_REAL, wait)
            await self.alarm.wait()

    async def _send(self, due: float, port: int) -> None:
        idle = self.idle[port]
        if not idle and len(self.connections) < MAX_CONNECTIONS:
            await self._open(port)
        if idle:
            idle.pop().send(due)

    async def _open(self, port: int) -> None:
        loop, idle = asyncio.get_running_loop(), self.idle[port]
        _, connection = await loop.create_connection(lambda: _Connection(self, idle), "127.0.0.1", port)
        self.connections.append(connection)
        idle.append(connection)

    def _measure(self) -> Measure:
        good = [late for status, late, _ in self.answers if status == 200 and late <= DEADLINE_S]
        refused = [late for status, late, _ in self.answers if status == 503]
        span = self.due[-1]
        # What a server finishes after the last arrival is its backlog, not a rate that it can keep.
        kept = sum(status == 200 and late <= DEADLINE_S and came <= self.end for status, late, came in self.answers)
        return Measure(
            kept / span,
            percentile_ms(good, 50),
            percentile_ms(good, 99),
            failures=len(self.due) - len(good) - len(refused),
            offered=len(self.due) / span,
            refused=len(refused),
            refused_p99_ms=percentile_ms(refused, 99),
        )


def percentile_ms(seconds: list[float], percent: float) -> float:
    """Percentile in milliseconds; 0 without values."""
    return float(np.percentile(seconds, percent) * 1e3) if seconds else 0.0


class _Connection(asyncio.Protocol):
    """A connection with one request at a time; it counts answers without parsing them."""

    def __init__(self, load: _Load, idle: list[_Connection]) -> None:
        self.load, self.idle, self.due, self.missing, self.head = load, idle, 0.0, 0, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def send(self, due: float) -> None:
        self.due, self.head, self.missing = due, b"", -1
        self.transport.write(self.load.wire)

    def data_received(self, data: bytes) -> None:
        if self.missing < 0:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return
            length = int(self.head[:end].lower().split(b"\r\ncontent-length:")[1].split(b"\r\n")[0])
            self.missing = length - (len(self.head) - end - 4)
        else:
            self.missing -= len(data)
        if self.missing == 0:
            now = asyncio.get_running_loop().time()
            self.load.answers.append((int(self.head[9:12]), now - self.due, now))
            self.idle.append(self)
