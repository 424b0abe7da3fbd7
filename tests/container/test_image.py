"""What is in the image and what is not, and how soon it serves."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import distributions

import pytest

from tests.container.engine import docker, inspect, published, ready, until

pytestmark = pytest.mark.container
LARGEST_MB = 400
SLOWEST_S = 15.0  # a second or two where nothing else runs
INSTALLED = """
import json
from importlib.metadata import distributions
print(json.dumps({each.name: each.version for each in distributions()}))
"""


def inside(image: str, *command: str) -> str:
    """What a command prints in a fresh container."""
    return docker("run", "--rm", "--read-only", "--network", "none", image, *command)


def test_it_holds_what_serves_and_no_more(image: str, figure: Callable[[str], None]) -> None:
    """No torch, no trainer, no compiler, no installer, no cache and no test of a package; at most 400 MB."""
    megabytes = inspect(image)["Size"] / 1e6
    figure(f"the image has {megabytes:.0f} MB")
    assert megabytes < LARGEST_MB
    unwanted = ("torch", "training", "pip", "setuptools", "tests", "__pip__", ".cache", "gcc", "cc", "ld", "make")
    names = [word for name in unwanted for word in ("-o", "-name", name)][1:]
    found = inside(image, "find", "/", "-xdev", "(", *names, ")", "-not", "-path", "/usr/share/*").split()
    assert found == []
    assert inside(image, "find", "/var/cache", "/var/lib/apt/lists", "/root", "-type", "f", "-size", "+64k") == ""


def test_its_bill_of_materials_names_every_package(image: str) -> None:
    """CycloneDX, made by the build: every distribution in its version, with its address, and none that is not there."""
    bill = json.loads(inside(image, "cat", "/venv/sbom.cdx.json"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    installed = json.loads(inside(image, "python", "-c", INSTALLED))
    assert {part["name"]: part["version"] for part in bill["components"]} == installed
    assert {"vae-service", "onnxruntime", "numpy"} <= installed.keys()
    assert "cyclonedx-bom" not in installed
    pinned = {each.name: each.version for each in distributions()}
    assert installed["onnxruntime"] == pinned["onnxruntime"]
    assert all(part["purl"].startswith("pkg:pypi/") for part in bill["components"] if part["name"] != "vae-service")


def test_it_starts_soon_and_stops_in_good_order(image: str, figure: Callable[[str], None]) -> None:
    """From `docker run` to ready, every model checked; then SIGTERM ends it with 0."""
    options = ("--detach", "--init", "--read-only", "--publish", "127.0.0.1::8000")
    container = docker("run", *options, image)
    try:
        url = published(container, 8000)
        seconds = until(lambda: ready(url))
        figure(f"ready {seconds:.1f} s after `docker run`")
        assert seconds < SLOWEST_S
        docker("stop", container)
        assert inspect(container)["State"]["ExitCode"] == 0
    finally:
        docker("rm", "--force", container)
