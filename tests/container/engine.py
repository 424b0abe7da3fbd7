"""Helpers that call the container engine."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """`docker ...`, whatever comes of it."""
    words = ["docker", *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, **more)


def docker(*arguments: str, **more: Any) -> str:
    """What `docker ...` prints; where it fails, the test fails with what it said."""
    done = run(*arguments, **more)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout.strip()


def inspect(name: str) -> dict[str, Any]:
    """All that the engine knows of a container or an image."""
    return json.loads(docker("inspect", name))[0]


def until(true: Callable[[], bool], seconds: float = 90.0) -> float:
    """Wait until it is true; gives the seconds that it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - began


def ready(url: str) -> bool:
    """Whether a service is ready."""
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def published(container: str, port: int) -> str:
    """Address of a container's published port."""
    return f"http://{docker('port', container, str(port))}"


class Stack:
    """The compose file as shipped, as a project of its own on free ports of loopback.

    Args:
        name: Name of the project.
        **variables: Variables that the compose file takes.
    """

    def __init__(self, name: str, **variables: str) -> None:
        self.name = name
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("VAE_", "RAY_"))}
        ports = dict.fromkeys(("VAE_PORT", "BALANCER_PORT", "PROMETHEUS_PORT", "RAY_SERVE_PORT"), "0")
        self._environment = {**kept, **ports, **variables}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`docker compose ...`, whatever comes of it."""
        profiles = ("--profile", "balanced", "--profile", "monitoring", "--profile", "ray")
        return run("compose", "-p", self.name, *profiles, *arguments, env=self._environment)

    def compose(self, *arguments: str) -> str:
        """What `docker compose ...` prints; where it fails, the test fails with what it said."""
        done = self.run(*arguments)
        assert done.returncode == 0, f"docker compose {' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout

    def containers(self, service: str) -> list[str]:
        """Their ids."""
        return self.compose("ps", "--all", "--quiet", service).split()
