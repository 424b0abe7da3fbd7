"""Several replicas behind the balancer: requests are distributed, and replicas may be restarted one by one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.container.engine import Stack, docker, inspect, published, ready, until
from tests.support.load import HEADERS, Load, outcome

pytestmark = pytest.mark.container
PIXELS = np.random.default_rng(3).random((2, 1, 28, 28), np.float32).tobytes()
REQUESTS: tuple[tuple[str, bytes], ...] = (
    ("/v1/reconstruct", PIXELS),
    ("/v1/sample?count=256&seed=7", b""),
    ("/v1/encode", PIXELS),
)


@pytest.fixture(scope="module")
def balancer(stack: Stack) -> str:
    """URL of the balancer."""
    return published(stack.containers("balancer")[0], 8080)


def answered(container: str) -> float:
    """Requests that one replica has answered since it started."""
    text = httpx.get(f"{published(container, 8000)}/metrics", timeout=10).text
    families = text_string_to_metric_families(text)  # none of that name before the first request
    return sum(sample.value for family in families if family.name == "vae_requests" for sample in family.samples)


def test_every_replica_gets_work(stack: Stack, balancer: str) -> None:
    """The balancer uses every replica, passes problems unchanged, and refuses calls that concern a single replica."""
    before = {each: answered(each) for each in stack.containers("vae")}
    with httpx.Client(base_url=balancer, headers=HEADERS, timeout=60) as client:
        for _ in range(60):
            assert outcome(client, "/v1/encode", PIXELS) == "ok"
        problem = client.post("/v1/encode", content=b"123")
        assert problem.headers["content-type"] == "application/problem+json"
        for answer in (client.get("/metrics"), client.post("/v1/models/mnist/load")):
            assert (answer.status_code, answer.headers["content-type"]) == (404, "text/html")
    until(lambda: all(answered(each) >= before[each] + 5 for each in before), 5)


def test_a_rolling_restart_loses_no_request(stack: Stack, balancer: str, figure: Callable[[str], None]) -> None:
    """Under load replicas are restarted one by one: each drains and exits with 0, and every request is answered."""
    with Load(balancer, REQUESTS) as load:
        for container in stack.containers("vae"):
            docker("stop", container)
            assert inspect(container)["State"]["ExitCode"] == 0
            docker("start", container)
            until(lambda: ready(published(container, 8000)))  # noqa: B023  # called before it changes
            time.sleep(1)
    figure(f"{load.outcomes['ok']} requests during a rolling restart of {len(stack.containers('vae'))} replicas")
    assert list(load.outcomes) == ["ok"]
    assert load.outcomes["ok"] > 100
    assert all(answered(each) > 0 for each in stack.containers("vae"))


def test_a_killed_replica_costs_its_own_requests_only(stack: Stack, balancer: str) -> None:
    """A killed replica costs at most one request a client, as a 502; another replica answers every later one."""
    victim = stack.containers("vae")[0]
    with Load(balancer, REQUESTS) as load:
        time.sleep(1)
        docker("kill", victim)
        killed = time.monotonic()
        time.sleep(2)
        docker("start", victim)
        until(lambda: ready(published(victim, 8000)))
    assert all(failure.said.startswith("502 ") for failure in load.failures), load.failures
    assert [failure for failure in load.failures if failure.sent > killed] == []
    callers = Counter(failure.caller for failure in load.failures)
    assert all(count == 1 for count in callers.values()), load.failures
    assert load.outcomes["ok"] > 20
