"""Ray Serve in containers, as compose starts it: it answers, is confined, and outlives a killed node."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.container.engine import Stack, docker, inspect, published, until
from tests.support.load import Load, check_failures

pytestmark = pytest.mark.container
WORK = (("/v1/sample?count=256&seed=7", b""),)
CALLERS = 24  # above the 16 requests under way for which one replica is enough
NODES = 2


@pytest.fixture(scope="module")
def ray() -> Iterator[Stack]:
    """A head and two nodes, healthy; removed at the end."""
    docker("compose", "--profile", "ray", "build", "ray-head")
    stack = Stack(f"vae-test-ray-{os.getpid()}", RAY_AUTH_TOKEN=os.urandom(32).hex(), VAE_VERSIONS="mnist:all")
    try:
        scale = ("--scale", f"ray-worker={NODES}")
        stack.compose("up", "--detach", "--no-build", "--wait", *scale, "ray-head", "ray-worker")
        yield stack
    finally:
        stack.compose("down", "--timeout", "1")


def replicas(stack: Stack) -> list[str]:
    """The nodes with a replica."""
    titles = ("sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null || true")
    return [one for one in stack.containers("ray-worker") if "ServeReplica" in docker("exec", one, *titles)]


def test_the_nodes_are_confined(ray: Stack) -> None:
    """Not root, no capability, a read-only root, limits; the service's port alone is published, on loopback."""
    nodes = [*ray.containers("ray-head"), *ray.containers("ray-worker")]
    assert len(nodes) == 1 + NODES
    for node in nodes:
        known = inspect(node)
        host = known["HostConfig"]
        assert known["State"]["Health"]["Status"] == "healthy"
        assert (host["ReadonlyRootfs"], host["Privileged"]) == (True, False)
        assert min(host["Memory"], host["NanoCpus"], host["PidsLimit"]) > 0
        status = docker("exec", node, "cat", "/proc/self/status")
        assert "CapBnd:\t0000000000000000" in status
        assert docker("exec", node, "id", "-u") == "10001"
    ports = [found for node in nodes for found in inspect(node)["NetworkSettings"]["Ports"].items()]
    assert [(port, {one["HostIp"] for one in where}) for port, where in ports if where] == [("8000/tcp", {"127.0.0.1"})]


def test_a_killed_node_costs_its_own_requests_alone(ray: Stack, figure: Callable[[str], None]) -> None:
    """A second replica comes with the load. When its node is killed, its requests alone fail, soon."""
    with Load(published(ray.containers("ray-head")[0], 8000), WORK, CALLERS) as load:
        until(lambda: len(replicas(ray)) == NODES)
        time.sleep(15)  # until both have opened their models
        victim = replicas(ray)[0]
        docker("kill", victim)
        killed = time.monotonic()
        time.sleep(10)  # twice as long as its requests may take to fail
    figure(f"a Ray node killed: {check_failures(load, killed)}")
