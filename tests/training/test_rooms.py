"""Imports inside the trainer run down its rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIERS = (
    {"errors"},
    {"extras", "files", "progress", "strict"},
    {"canvas", "signing"},
    {"distributions"},
    {"networks", "data"},
    {"config", "models"},
    {"objectives", "inference"},
    {"loop"},
    {"evaluation"},
    {"export"},
    {"importing"},
    {"pipeline"},
    {"conditional", "noisy"},
    {"cli"},
    {"__main__"},
)
"""Rooms and modules of `training`, the lowest first; one imports itself and those of lower tiers."""
HEIGHTS = {room: height for height, tier in enumerate(TIERS) for room in tier}
FILES = sorted(path for path in (ROOT / "training").rglob("*.py") if path != ROOT / "training" / "__init__.py")


def room(path: Path) -> str:
    """The room of a file, or its own name where it is in none."""
    return path.relative_to(ROOT / "training").with_suffix("").parts[0]


def imported(source: str) -> Iterator[str]:
    """Rooms of `training` that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("training."))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_runs_up(path: Path) -> None:
    """A file imports its own room and rooms of lower tiers alone."""
    own = room(path)
    upward = {name for name in imported(path.read_text()) if name != own and HEIGHTS[name] >= HEIGHTS[own]}
    assert upward == set()


def test_every_room_has_a_tier() -> None:
    """A new room is placed in the order, and none that is gone stays in it."""
    assert {room(path) for path in FILES} == HEIGHTS.keys()


def test_an_import_inside_a_function_counts() -> None:
    """Of a module and of a name."""
    source = (
        "def f():\n import training.models.vae\n from training.loop.trainer import train\n from training import cli\n"
    )
    assert set(imported(source)) == {"loop", "models", "cli"}
