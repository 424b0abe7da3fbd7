"""The code blocks of the documentation's pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARK = re.compile(r"<!-- not run: (.+?) -->")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4,}\S.*\n)+")


class Block(NamedTuple):
    """A block of code in a page; an indented one is of commands."""

    page: str
    line: int
    language: str
    text: str
    reason: str
    """Why it is not run: the text of `<!-- not run: ... -->` above it, or nothing."""

    def place(self) -> str:
        """Where it stands."""
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Continued lines are one command, and so is a loop, which is a block of its own."""
        return [self.text] if self.text.startswith("for ") else self.text.replace("\\\n", " ").splitlines()


def blocks(path: Path) -> list[Block]:
    """Those of a page, in order."""
    page = path.read_text()
    blank = FENCED.sub(lambda found: "\n" * found.group().count("\n"), page)
    found = [(fenced.start(), fenced[1], fenced[2]) for fenced in FENCED.finditer(page)]
    lines = [0, *(index + 1 for index, character in enumerate(page) if character == "\n")]
    for indented in INDENTED.finditer(blank):
        start = lines[blank.count("\n", 0, indented.start())]
        found.append((start, "sh", re.sub(r"^ {4,6}", "", indented.group(), flags=re.MULTILINE)))
    return [
        Block(path.name, page.count("\n", 0, start) + 1, language, text, _reason(page[:start]))
        for start, language, text in sorted(found)
    ]


def _reason(before: str) -> str:
    """The reason in the mark that ends the text before a block."""
    *_, last = before.rstrip().splitlines() or [""]
    found = MARK.fullmatch(last.strip())
    return found[1] if found else ""
