"""The service as a process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from training.evaluation.served import started


@pytest.fixture
def start_service() -> Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]:
    """A function that starts `python -m service` with the settings it is given, for a `with` block."""
    return started
