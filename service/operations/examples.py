"""Examples in the OpenAPI document."""

from __future__ import annotations

from typing import Any


def example(answer: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """Document an answer with status 200 by an example.

    Args:
        answer: The example, as JSON.

    Returns:
        The argument `responses` of a FastAPI route.
    """
    return {200: {"content": {"application/json": {"example": answer}}}}


PROGRESS = {"step": 10, "steps": 100, "active": 1, "elbo": [-98.2]}
"""A progress event of refinement."""
