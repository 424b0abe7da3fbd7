"""Writes the tables of docs/operations.md from the code: python docs/reference.py.

What lies between `<!-- name -->` and `<!-- end -->` is the table of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from service.config import PREFIX, Settings
from service.telemetry import Telemetry

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "operations.md"
ALERTS = ROOT / "deploy" / "alerts.yml"


def main() -> None:
    """The page, with its tables made anew."""
    PAGE.write_text(with_tables(PAGE.read_text()))


def with_tables(page: str) -> str:
    """A page whose tables are current."""
    for name, make in TABLES.items():
        before, rest = page.split(f"<!-- {name} -->\n")
        _, after = rest.split("<!-- end -->", 1)
        page = f"{before}<!-- {name} -->\n{make()}<!-- end -->{after}"
    return page


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """In Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def settings() -> str:
    """Every setting as an environment variable, with its default."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "" if default in ("", None, (), []) else f"`{default}`"
        meaning = " ".join((field.description or "").split()).replace("<", "&lt;")
        rows.append((f"`{PREFIX}{name.upper()}`", shown, meaning))
    return table(("variable", "default", "meaning"), rows)


def metrics() -> str:
    """Every metric as Prometheus names it; a histogram is three."""
    families = Telemetry(lambda: (0, 0)).registry.collect()
    names = {"counter": "{}_total", "histogram": "{}_bucket`, `_sum`, `_count"}
    rows = [(f"`{names.get(f.type, '{}').format(f.name)}`", f.type, f.documentation) for f in families]
    return table(("metric", "type", "meaning"), rows)


def alerts() -> str:
    """Every alert with what it looks at and what to do."""
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    rows = [(rule["alert"], f"`{' '.join(rule['expr'].split())}`", rule["annotations"]["action"]) for rule in rules]
    return table(("alert", "when", "what to do"), rows)


TABLES: dict[str, Callable[[], str]] = {"settings": settings, "metrics": metrics, "alerts": alerts}

if __name__ == "__main__":
    main()
