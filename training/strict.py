"""The base of every table in a run's TOML."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Widths = Annotated[tuple[Positive, ...], Field(min_length=1)]
"""One or more sizes."""


class Strict(BaseModel):
    """Frozen, and an unknown key is an error. The docstring of a key is its description in docs/configuration.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
