"""A container is confined to its work."""

from __future__ import annotations

import re

import pytest

from tests.container.engine import Stack, docker, inspect

pytestmark = pytest.mark.container
KILLED = 137
GREEDY = """
import threading
from service.contract.cores import cpu_count
threads = 0
try:
    while threads < 500:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        threads += 1
except RuntimeError:
    pass
print(threads, cpu_count(), flush=True)
b"x" * (2 << 30)
"""


@pytest.mark.parametrize("service", ["vae", "balancer", "prometheus"])
def test_it_has_no_privileges(stack: Stack, service: str) -> None:
    """The process is not root, has no capability and gains none, has filtered system calls and a read-only root."""
    container = stack.containers(service)[0]
    status = docker("exec", container, "cat", "/proc/self/status")
    said = dict(re.findall(r"^(\w+):\s+(\S+)", status, re.MULTILINE))
    assert int(said["Uid"]) > 0
    assert [int(said[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")] == [0] * 5
    assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2")
    for folder in ("/", "/etc", "/usr"):
        tried = docker("exec", container, "sh", "-c", f"touch {folder}/x 2>&1 || true")
        assert "Read-only file system" in tried


@pytest.mark.parametrize("service", ["vae", "balancer", "prometheus"])
def test_it_is_watched_and_limited(stack: Stack, service: str) -> None:
    """It has a passing health check, limits for CPU, memory and processes, and no port outside loopback."""
    for container in stack.containers(service):
        known = inspect(container)
        host = known["HostConfig"]
        assert known["State"]["Health"]["Status"] == "healthy"
        assert host["ReadonlyRootfs"]
        assert not host["Privileged"]
        assert min(host["Memory"], host["NanoCpus"], host["PidsLimit"]) > 0
        ports = [where for found in known["NetworkSettings"]["Ports"].values() for where in found or ()]
        assert {where["HostIp"] for where in ports} == {"127.0.0.1"}


def test_its_limits_are_enforced(stack: Stack) -> None:
    """Too many threads fail, too much memory is killed, and the service knows its share of the CPUs."""
    done = stack.run("run", "--rm", "--no-deps", "--no-TTY", "vae", "python", "-c", GREEDY)
    threads, cpus = map(int, done.stdout.split())
    assert 0 < threads < 128
    assert cpus == 1
    assert done.returncode == KILLED


def test_models_cannot_be_changed(stack: Stack) -> None:
    """Models are the host's files, mounted read-only."""
    tried = docker("exec", stack.containers("vae")[0], "sh", "-c", "touch /models/x 2>&1 || true")
    assert "Read-only file system" in tried
