"""Which versions of which models are served, as the setting `versions` selects them."""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

ALL, LATEST = "all", "latest"


@dataclass(frozen=True)
class Selection:
    """Versions selected by a text: `all`, `latest`, or a list such as `mnist:2,mnist:3,mnist-2d:latest`.

    Models that a list does not name are not served.
    """

    text: str = ALL

    @property
    def models(self) -> set[str] | None:
        """Names of the models in the list; None where the text selects every model."""
        return None if self.text in (ALL, LATEST) else {entry.partition(":")[0] for entry in self.text.split(",")}

    def chosen(self, model: str, versions: AbstractSet[str]) -> set[str]:
        """Select from the versions of a model. A version named by its number need not exist."""
        if self.text in (ALL, LATEST):
            return _those(self.text, versions)
        named = [entry.partition(":") for entry in self.text.split(",")]
        return {version for name, _, which in named if name == model for version in _those(which, versions)}


def _those(which: str, versions: AbstractSet[str]) -> set[str]:
    if which == ALL:
        return set(versions)
    if which == LATEST:
        return {max(versions, key=version_key)} if versions else set()
    return {which}


def version_key(version: str) -> list[tuple[int, int | str]]:
    """Sort key that compares numbers within a version by value: 2 before 10, 1.9 before 1.10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", version) if part]
