"""Examples of answers, for OpenAPI."""

from __future__ import annotations

from typing import Any


def example(answer: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """An answer with status 200."""
    return {200: {"content": {"application/json": {"example": answer}}}}


PROGRESS = {"step": 10, "steps": 100, "active": 1, "elbo": [-98.2]}
"""Of refined work, after every window of steps."""
