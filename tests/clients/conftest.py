"""Environments of clients that others have written."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.environments import InstallFailed, ignored_home, prepare


def python_of(name: str, folder: str) -> str:
    """The interpreter of an environment with a client; without the client the test is skipped.

    Args:
        name: Name of the environment.
        folder: Folder beside this file that holds its requirements.
    """
    ignored_home()
    try:
        return prepare(name, Path(__file__).parent / folder / "requirements.txt")
    except InstallFailed as error:
        pytest.skip(f"{name} cannot be installed here: {error}")
