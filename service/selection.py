"""Which versions of which models are served: what VAE_VERSIONS says."""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

ALL, LATEST = "all", "latest"


@dataclass(frozen=True)
class Selection:
    """`all`, `latest`, or a list such as `mnist:2,mnist:3,mnist-2d:latest`, whose other models are not served."""

    text: str = ALL

    def __post_init__(self) -> None:
        """Raise ValueError where the text is none of these."""
        for entry in () if self.text in (ALL, LATEST) else self.text.split(","):
            if not all(entry.partition(":")):
                raise ValueError(f"{entry!r} is not `model:version`; say all, latest, or model:version,model:version")

    @property
    def models(self) -> set[str] | None:
        """The models it names; None where it means every one."""
        return None if self.text in (ALL, LATEST) else {entry.partition(":")[0] for entry in self.text.split(",")}

    def chosen(self, model: str, versions: AbstractSet[str]) -> set[str]:
        """Those of a model's versions that are to be served; one named by its number, also where it is not there."""
        if self.text in (ALL, LATEST):
            return _those(self.text, versions)
        named = [entry.partition(":") for entry in self.text.split(",")]
        return {version for name, _, wish in named if name == model for version in _those(wish, versions)}


def _those(wish: str, versions: AbstractSet[str]) -> set[str]:
    if wish == ALL:
        return set(versions)
    if wish == LATEST:
        return {max(versions, key=version_key)} if versions else set()
    return {wish}


def version_key(version: str) -> list[tuple[int, int | str]]:
    """Orders versions as a person would: 2 before 10, 1.9 before 1.10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", version) if part]
