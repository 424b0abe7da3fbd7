"""Optional packages."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from training.errors import DependencyError


def needed(module: str, extra: str = "evaluation") -> Any:
    """Import a module of an extra.

    Args:
        module: The module.
        extra: The extra of pyproject.toml that brings it.

    Raises:
        DependencyError: It is not installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"{module.partition('.')[0]} cannot be imported ({error}); pip install '.[{extra}]' in the project's folder"
        ) from error


def installed(package: str) -> str:
    """The version of an installed package, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
