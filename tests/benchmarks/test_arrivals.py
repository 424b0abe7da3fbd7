"""The open loop's client, against a server on loopback."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks import arrivals
from benchmarks.bodies import RAW, Body

SMALL = Body("/", {"content-type": RAW}, bytes(3136))


class Answering:
    """Answers every request after it has read the body, head and body apart; some it answers not at all."""

    def __init__(self, status: int = 200, closed: int = 0) -> None:
        self.status, self.closed, self.requests = status, closed, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                self.requests += 1
                if self.requests <= self.closed:
                    break
                writer.write(b"HTTP/1.1 %d -\r\nContent-Length: 5\r\n\r\n" % self.status)
                await asyncio.sleep(0.001)
                writer.write(b"12345")
        except asyncio.IncompleteReadError:
            pass
        writer.close()


@contextmanager
def listening(server: Answering) -> Iterator[int]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    one = asyncio.run_coroutine_threadsafe(asyncio.start_server(server.serve, "127.0.0.1", 0), loop).result()
    try:
        yield one.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(ended(one), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def ended(server: asyncio.Server) -> None:
    server.close()
    await asyncio.sleep(0.01)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def test_every_request_is_sent_and_its_answer_counted() -> None:
    """To all servers together, at the rate exactly; the server's time is a part of the whole."""
    first, second = Answering(), Answering()
    with listening(first) as one, listening(second) as two:
        found = arrivals.run([one, two], SMALL, 200.0, 0.5)
    assert found.offered == pytest.approx(200.0)
    assert (found.failures, found.refused) == (0, 0)
    assert first.requests + second.requests == 100
    assert min(first.requests, second.requests) > 0
    assert 1.0 <= found.served_p50_ms <= found.p50_ms
    assert found.served_p99_ms <= found.p99_ms


def test_the_kernel_tells_when_an_answer_came() -> None:
    """The client's own delay is no part of the server's time."""
    assert arrivals.received([(1, arrivals.SO_TIMESTAMPNS, arrivals.STAMP.pack(7, 250_000_000))]) == 7.25
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = arrivals._Connection(server.getsockname()[1])
        peer, _ = server.accept()
        with peer, connection.socket:
            for _ in range(100):  # the kernel begins to note times a moment after it was asked to
                connection.begin(0.0, b"")
                peer.sendall(b"HTTP/1.1 200 -\r\nContent-Length: 0\r\n\r\n")
                select.select([connection.socket], [], [])
                before = time.time()
                if connection.read() <= before:
                    return
                time.sleep(0.01)
    pytest.fail("every answer was noted when it was read")


def test_a_body_larger_than_the_socket_takes_is_sent_in_parts() -> None:
    """The rest follows when the server has read some."""
    server = Answering()
    with listening(server) as port:
        found = arrivals.run(port, Body("/", {}, bytes(8 << 20)), 10.0, 0.5)
    assert (found.failures, server.requests) == (0, 5)


def test_refusals_are_no_failures() -> None:
    """503 is an answer of its own kind."""
    with listening(Answering(status=503)) as port:
        found = arrivals.run(port, SMALL, 100.0, 0.2)
    assert (found.refused, found.failures, found.rate) == (20, 0, 0.0)


def test_a_closed_connection_costs_its_own_request_alone() -> None:
    """The others go on."""
    with listening(Answering(closed=3)) as port:
        found = arrivals.run(port, SMALL, 100.0, 0.5)
    assert found.failures == 3
