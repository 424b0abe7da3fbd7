"""Base class of every table in a run's TOML."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Widths = Annotated[tuple[Positive, ...], Field(min_length=1)]
"""One or more sizes."""


class Strict(BaseModel):
    """A frozen table without unknown keys. A key's docstring is its description in docs/configuration.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
