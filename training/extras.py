"""Packages that only some commands need."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from training.errors import DependencyError


def needed(module: str) -> Any:
    """A module of the extra `evaluation`.

    Raises: DependencyError naming the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".", 1)[0]
        raise DependencyError(
            f"{package} cannot be imported ({error}); pip install '.[evaluation]' in the project's folder"
        ) from error


def installed(package: str) -> str:
    """The version of a package, or that it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
