"""Fixtures: the image, and the compose stack of three replicas, balancer and Prometheus."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.container.engine import Stack, docker, run

STAND_IN = Path(__file__).with_name("stand-in.Dockerfile")
OTHERS = ("nginx:1.28", "prom/prometheus:v3.5.0")
REPLICAS = 3


@pytest.fixture(scope="session")
def image() -> str:
    """The service's image, built as released."""
    docker("compose", "build", "vae")
    return "vae-service"


@pytest.fixture(scope="session")
def others(figure: Callable[[str], None]) -> None:
    """Other images: the real ones if present or pullable, else the same programs from Debian."""
    missing = [image for image in OTHERS if run("image", "inspect", image).returncode and run("pull", image).returncode]
    if missing:
        tags = [word for image in missing for word in ("--tag", image)]
        docker("build", *tags, "--label", "stand-in=debian", "-", input=STAND_IN.read_text())
    standing = [image for image in OTHERS if docker("image", "ls", "--quiet", "--filter", "label=stand-in", image)]
    for image in standing:
        figure(f"Debian's own program stands in for {image}")


@pytest.fixture(scope="session")
def stack(image: str, others: None) -> Iterator[Stack]:  # noqa: ARG001  # both are to be there
    """The compose stack, healthy; removed with its volumes at the end."""
    stack = Stack(f"vae-test-{os.getpid()}")
    try:
        scale = ("--scale", f"vae={REPLICAS}")
        stack.compose("up", "--detach", "--no-build", "--wait", *scale, "vae", "balancer", "prometheus")
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "5")
