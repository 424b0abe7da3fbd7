"""The environment of what runs on Ray: the service's dependencies and Ray's, with pinned packages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.environments import InstallFailed, ignored_home, prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def ray_python() -> str:
    """Its interpreter; where Ray cannot be installed the test is skipped."""
    ignored_home()
    try:
        return prepare("ray-test", Path(__file__).parent / "requirements.txt")
    except InstallFailed as error:
        pytest.skip(f"Ray cannot be installed here: {error}")


@pytest.fixture(scope="session")
def ray_environment() -> dict[str, str]:
    """Variables of a process that starts Ray: our modules, no reports to its makers, no cluster of somebody else."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**others, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
