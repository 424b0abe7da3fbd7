"""Faults in one real process: it answers every accepted request correctly, and recovers by itself."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import socket
import time
from statistics import median

import numpy as np

from tests.faults.conftest import LIMIT_S, Outcome, Service, ask, connected, eventually, keep_asking, wire

FLOOD_S = float(os.environ.get("FLOOD_S", "5"))
"""Of the flood; a minute shows more than the few seconds that the ordinary tests can spare."""
HARD = wire("/v1/reconstruct?draws=64&seed=7", np.zeros((16, 784), "<f4").tobytes(), x_timeout_ms="2000")
"""Some hundredths of a second of work."""
EASY = wire("/v1/sample?count=4&seed=7")
LARGE = wire("/v1/sample?count=16384&seed=7")
IDLE = 1000


def right_answer(service: Service, request: bytes) -> bytes:
    outcome = asyncio.run(ask(service.port, request))
    assert outcome.status == 200
    return outcome.content


def test_model_files_may_be_spoilt_while_it_serves(service: Service) -> None:
    """Truncated, replaced or deleted files do not matter: the model in memory is the checked one."""
    before = right_answer(service, EASY)
    graph = next(service.models.rglob("decoder.onnx"))
    os.truncate(graph, 100)
    assert right_answer(service, EASY) == before
    graph.with_suffix(".new").write_bytes(b"no graph")
    graph.with_suffix(".new").replace(graph)
    assert right_answer(service, EASY) == before
    shutil.rmtree(service.models)
    assert right_answer(service, EASY) == before
    assert right_answer(service, HARD)


def test_a_thousand_idle_connections_keep_nobody_waiting(service: Service) -> None:
    """With a thousand idle connections other requests are answered, and every connection is freed."""
    idle = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(IDLE)]
    try:
        eventually(lambda: service.connections() >= IDLE)
        found = [asyncio.run(ask(service.port, EASY)) for _ in range(5)]
    finally:
        for one in idle:
            one.close()
    assert {outcome.status for outcome in found} == {200}
    eventually(lambda: service.connections() == 0)


def test_half_closed_connections_are_answered_or_closed(service: Service) -> None:
    """A half-closed connection leaves nothing behind, whether its request is complete or not."""
    for sent in (HARD, HARD[:-100], EASY[:30], b""):
        with socket.create_connection(("127.0.0.1", service.port), timeout=LIMIT_S) as one:
            one.sendall(sent)
            one.shutdown(socket.SHUT_WR)
            while one.recv(2**16):
                pass
    eventually(lambda: service.connections() == 0)
    assert right_answer(service, EASY)


def test_a_caller_that_stops_reading_holds_up_nobody(service: Service) -> None:
    """A client that stops reading 49 MiB costs little memory and no other request; disconnecting ends its work."""
    right_answer(service, EASY)
    before, counted = service.kib("VmRSS"), service.metric("vae_requests_total")
    with socket.create_connection(("127.0.0.1", service.port)) as lazy:
        lazy.sendall(LARGE)
        assert lazy.recv(1000).startswith(b"HTTP/1.1 200")
        time.sleep(1.0)
        assert asyncio.run(ask(service.port, EASY)).status == 200
        assert service.kib("VmRSS") - before < 24 * 1024
    eventually(lambda: service.metric("vae_running_batches") == 0 == service.metric("vae_queued_rows"))
    eventually(lambda: service.metric("vae_requests_total") >= counted + 2)


def test_a_flood_is_refused_and_what_is_taken_is_right(service: Service) -> None:
    """At four times its capacity: correct answers, faster refusals, and normal service afterwards."""
    expected = right_answer(service, HARD)
    rate = asyncio.run(capacity(service.port))
    outcomes = asyncio.run(flood(service.port, 4.0 * rate))
    after = asyncio.run(ask(service.port, HARD))
    by_status = {status: [o for o in outcomes if o.status == status] for status in (200, 503, 504)}
    assert sum(map(len, by_status.values())) == len(outcomes)
    assert {outcome.content for outcome in by_status[200]} == {expected}
    refused_s, served_s = (median(outcome.seconds for outcome in by_status[status]) for status in (503, 200))
    assert refused_s < served_s
    assert (after.status, after.content) == (200, expected)


async def capacity(port: int) -> float:
    """Requests a second of four clients that each wait for their answer."""
    stop, began = asyncio.Event(), time.monotonic()
    callers = [asyncio.create_task(keep_asking(port, HARD, stop)) for _ in range(4)]
    await asyncio.sleep(1.5)
    stop.set()
    found = await asyncio.gather(*callers)
    return sum(map(len, found)) / (time.monotonic() - began)


async def flood(port: int, rate: float) -> list[Outcome]:
    """Requests at a fixed rate, whether or not earlier ones are answered."""
    began, tasks = time.monotonic(), list[asyncio.Task[Outcome]]()
    while (passed := time.monotonic() - began) < FLOOD_S:
        tasks += [asyncio.create_task(ask(port, HARD)) for _ in range(int(rate * passed) - len(tasks))]
        await asyncio.sleep(0.005)
    return list(await asyncio.gather(*tasks))


def test_what_finds_no_memory_is_refused_and_nothing_is_killed(service: Service) -> None:
    """With little address space a large answer is 503, and small ones succeed then and later."""
    request = wire("/v1/sample?count=5000&seed=7", accept="application/json")
    limit = 1024 * (service.kib("VmSize") + 16 * 1024)
    unlimited = resource.prlimit(service.worker, resource.RLIMIT_AS)
    resource.prlimit(service.worker, resource.RLIMIT_AS, (limit, unlimited[1]))
    try:
        refused = asyncio.run(ask(service.port, request))
        meanwhile = asyncio.run(ask(service.port, EASY))
    finally:
        resource.prlimit(service.worker, resource.RLIMIT_AS, unlimited)
    assert refused.status == 503
    assert b"memory" in refused.content
    assert meanwhile.status == 200
    assert right_answer(service, EASY) == meanwhile.content


def test_sigterm_under_load_answers_what_was_taken(service: Service) -> None:
    """On SIGTERM running long requests are answered, and the service exits with 0. Runs last."""
    long = wire("/v1/reconstruct?draws=64&seed=7", np.zeros((96, 784), "<f4").tobytes())
    expected = right_answer(service, long)

    async def scenario() -> tuple[list[Outcome], list[Outcome]]:
        stop = asyncio.Event()
        load = [asyncio.create_task(keep_asking(service.port, EASY, stop)) for _ in range(4)]
        taken: list[asyncio.Task[Outcome]] = []
        async with connected(service.port):
            while service.metric("vae_queued_rows") < 2 * 64:
                if all(task.done() for task in taken):  # sooner than this process looked
                    taken += [asyncio.create_task(ask(service.port, long)) for _ in range(5)]
                await asyncio.sleep(0.01)
            service.process.send_signal(signal.SIGTERM)
            answered = list(await asyncio.gather(*taken))
        stop.set()
        others = [outcome for found in await asyncio.gather(*load) for outcome in found]
        return answered, others

    answered, others = asyncio.run(scenario())
    assert answered
    assert all((outcome.status, outcome.content) == (200, expected) for outcome in answered)
    assert {outcome.status for outcome in others} <= {200, 0}
    assert service.process.wait(10) == 0
    assert asyncio.run(ask(service.port, EASY)).status == 0
