"""A load generator for loopback: one request, repeated over some connections for some seconds."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import numpy as np

READ = 1 << 16


@dataclass(frozen=True)
class Load:
    """What came of one load: requests a second, latencies in seconds, answers that were not 200."""

    rate: float
    latencies: np.ndarray
    failures: int

    def percentile_ms(self, percent: float) -> float:
        """Latency in milliseconds."""
        return float(np.percentile(self.latencies, percent) * 1e3)


def request(path: str, body: bytes, content_type: str, accept: str) -> bytes:
    """An HTTP/1.1 POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {content_type}\r\naccept: {accept}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def run(port: int, payload: bytes, connections: int, seconds: float) -> Load:
    """Send `payload` over and over; each connection waits for its answer before it sends again."""
    return asyncio.run(_run(port, payload, connections, seconds))


async def _run(port: int, payload: bytes, connections: int, seconds: float) -> Load:
    latencies: list[float] = []
    failures = [0]
    started = time.perf_counter()
    clients = [_client(port, payload, started + seconds, latencies, failures) for _ in range(connections)]
    await asyncio.gather(*clients)
    return Load(len(latencies) / (time.perf_counter() - started), np.array(latencies), failures[0])


async def _client(port: int, payload: bytes, end: float, latencies: list[float], failures: list[int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
    while (sent := time.perf_counter()) < end:
        writer.write(payload)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        latencies.append(time.perf_counter() - sent)
        failures[0] += not head.startswith(b"HTTP/1.1 200")
    writer.close()
    await writer.wait_closed()
