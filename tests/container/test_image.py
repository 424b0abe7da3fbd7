"""Content of the image, and the time to serve."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import distributions

import httpx
import pytest

from tests.client.conftest import SHIPPED
from tests.container.engine import docker, inspect, published, ready, until

pytestmark = pytest.mark.container
LARGEST_MB = 400
CPU_TIME = "cat /sys/fs/cgroup/cpuacct/cpuacct.usage || cat /sys/fs/cgroup/cpu.stat"
INSTALLED = """
import json
from importlib.metadata import distributions
print(json.dumps({each.name: each.version for each in distributions()}))
"""


def inside(image: str, *command: str) -> str:
    """Output of a command in a fresh container, as a user who may read everything."""
    return docker("run", "--rm", "--read-only", "--user", "0", "--network", "none", image, *command)


def cpu_time(container: str) -> float:
    """CPU seconds of a container: cgroup v1 counts in ns, v2 in us."""
    said = docker("exec", container, "sh", "-c", CPU_TIME)
    return int(said) / 1e9 if said.isdecimal() else int(said.split()[1]) / 1e6


def test_it_holds_what_serves_and_no_more(image: str, figure: Callable[[str], None]) -> None:
    """The image has no torch, trainer, compiler, installer, cache or package's tests, and at most 400 MB."""
    megabytes = inspect(image)["Size"] / 1e6
    figure(f"the image has {megabytes:.0f} MB")
    assert megabytes < LARGEST_MB
    unwanted = ("torch", "training", "pip", "setuptools", "ensurepip", ".cache", "gcc", "cc", "ld", "make", "perl")
    names = [word for name in unwanted for word in ("-o", "-name", name)][1:]
    assert inside(image, "find", "/", "-xdev", "(", *names, ")", "-not", "-path", "/usr/share/*") == ""
    assert inside(image, "find", "/venv", "-name", "tests") == ""
    assert inside(image, "find", "/var/cache", "/var/lib/apt/lists", "/root", "-type", "f", "-size", "+64k") == ""


def test_its_bill_of_materials_names_every_package(image: str) -> None:
    """The CycloneDX file lists every distribution with version and address, and no other."""
    bill = json.loads(inside(image, "cat", "/venv/sbom.cdx.json"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    installed = json.loads(inside(image, "python", "-c", INSTALLED))
    assert {part["name"]: part["version"] for part in bill["components"]} == installed
    assert {"vae-service", "onnxruntime", "numpy"} <= installed.keys()
    assert "cyclonedx-bom" not in installed
    pinned = {each.name: each.version for each in distributions()}
    assert installed["onnxruntime"] == pinned["onnxruntime"]
    assert all(part["purl"].startswith("pkg:pypi/") for part in bill["components"] if part["name"] != "vae-service")


def test_it_starts_and_stops_in_good_order(image: str, figure: Callable[[str], None]) -> None:
    """It is ready with every model after `docker run`, tells what a start costs, and exits with 0 on SIGTERM."""
    options = ("--detach", "--init", "--read-only", "--publish", "127.0.0.1::8000")
    container = docker("run", *options, image)
    try:
        url = published(container, 8000)
        seconds, cpu_s = until(lambda: ready(url)), cpu_time(container)
        figure(f"ready {seconds:.1f} s after `docker run`, {cpu_s:.1f} s of them computing")
        models = httpx.get(f"{url}/v1/models", timeout=30).json()["models"]
        assert {each["model"]: each["state"] for each in models} == dict.fromkeys(SHIPPED, "ready")
        docker("stop", container)
        assert inspect(container)["State"]["ExitCode"] == 0
    finally:
        docker("rm", "--force", container)
