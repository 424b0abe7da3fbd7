"""`make house`: what it measures, on a small tree whose figures are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import house

TREE = {
    "service/__init__.py": "",
    "service/top.py": "from service import left\nimport service.right\n",
    "service/left.py": "from service.room.deep import Name\n",
    "service/right.py": "def f():\n    from service import last\n",
    "service/last.py": "",
    "service/room/__init__.py": "",
    "service/room/deep.py": "from service import top\nclass Name: pass\nPair = tuple[int, int]\nLIMITS = tuple[int]\n",
    "training/same.py": 'class Name:\n """A Nobody."""\ndef f():\n    """Whoever asks."""\n    a = 1\n    return a\n',
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The small tree on disk."""
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_longest_chain_follows_imports_at_the_top_of_a_module(tree: Path) -> None:
    """An import inside a function does not count, and a circle ends the chain."""
    assert [path.stem for path in house.import_chain(tree)] == ["left", "deep", "top", "right"]


def test_classes_and_aliases_are_counted_by_name(tree: Path) -> None:
    """A capitalised name for a type is an alias, a constant is none."""
    assert house.classes(tree) == {
        "Name": ["service/room/deep.py", "training/same.py"],
        "Pair": ["service/room/deep.py"],
    }


def test_the_report_has_every_figure(tree: Path) -> None:
    """Folders, names that stand for two things, docstrings and the longest function."""
    lines = list(house.report(tree))
    assert house.row("largest flat folder, modules", 5, 16) in lines
    assert house.row("classes and type aliases", 3, 180) in lines
    assert house.row("names of two classes or aliases", 1, 0) in lines
    assert house.row("longest function, lines", 2, None) in lines
    assert [line for line in lines if "training/same.py:" in line][1:] == [
        "  training/same.py:1  A Nobody.",
        "  training/same.py:3  Whoever asks.",
    ]
