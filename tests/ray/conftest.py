"""The environment with Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.environments import InstallFailed, ignored_home, prepare


@pytest.fixture(scope="session")
def ray_python() -> Path:
    """The interpreter of an environment with Ray; where Ray cannot be installed, the test is skipped."""
    ignored_home()
    try:
        return Path(prepare("ray-tests", Path(__file__).with_name("requirements.txt")))
    except InstallFailed as error:
        pytest.skip(f"Ray cannot be installed here: {error}")
