"""Writes the tables of the pages below from the code: python docs/reference.py.

What lies between `<!-- name -->` and `<!-- end -->` is the table of that name. A link to a file of Python gets a line's
number where its text is that line of the file, or the name of a class or function in it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from service.contract import manifest
from service.contract.graphs import GRAPHS
from service.observability.metrics import Telemetry
from service.settings import PREFIX, Settings
from training.config import ConditionalRun, NoisyRun, RestoringRun, Run

ROOT = Path(__file__).parents[1]
PAGES = tuple(
    ROOT / "docs" / name
    for name in ("operations.md", "configuration.md", "importing.md", "mathematics.md", "models.md", "noisy-images.md")
)
ALERTS = ROOT / "deploy" / "alerts.yml"
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
CODE = re.compile(r"\[`([^`]+)`\]\(\.\./([\w/]+\.py)(?:#L\d+)?\)")
"""A link to a line of code."""
Schema = dict[str, Any]


def main() -> None:
    """Rewrite the tables and links of all pages."""
    for page in PAGES:
        page.write_text(with_lines(with_tables(page.read_text())))


def with_lines(page: str) -> str:
    """Give the links to lines of code their current numbers."""
    return CODE.sub(lambda found: f"[`{found[1]}`](../{found[2]}#L{line_of(found[1], ROOT / found[2])})", page)


def line_of(code: str, path: Path) -> int:
    """Number of the one line of a file that is `code`, or on which the class or function of that name begins.

    Raises:
        ValueError: There is none, or there are several.
    """
    text = path.read_text()
    found = [number for number, line in enumerate(text.splitlines(), 1) if line.strip() == code]
    found += [number for name, number in _definitions(ast.parse(text), "") if name == code]
    if len(found) != 1:
        raise ValueError(f"{path.relative_to(ROOT)} has `{code}` {len(found)} times; change the link in docs/")
    return found[0]


def _definitions(node: ast.AST, above: str) -> Iterator[tuple[str, int]]:
    """Dotted names of classes and functions, with their lines."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{above}{child.name}", child.lineno
            yield from _definitions(child, f"{above}{child.name}.")


def with_tables(page: str) -> str:
    """Replace the tables of a page with current ones."""
    for name, make in TABLES.items():
        if f"<!-- {name} -->\n" not in page:
            continue
        before, rest = page.split(f"<!-- {name} -->\n")
        _, after = rest.split("<!-- end -->", 1)
        page = f"{before}<!-- {name} -->\n{make()}<!-- end -->{after}"
    return page


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Format a table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def settings() -> str:
    """Table of every setting as an environment variable, with its default."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "" if default in ("", None, (), []) else f"`{default}`"
        meaning = " ".join((field.description or "").split()).replace("<", "&lt;")
        rows.append((f"`{PREFIX}{name.upper()}`", shown, meaning))
    return table(("variable", "default", "meaning"), rows)


def metrics() -> str:
    """Table of every metric under its Prometheus names; a histogram has three."""
    families = Telemetry(lambda: (0, 0)).registry.collect()
    names = {"counter": "{}_total", "histogram": "{}_bucket`, `_sum`, `_count"}
    rows = [(f"`{names.get(f.type, '{}').format(f.name)}`", f.type, f.documentation) for f in families]
    return table(("metric", "type", "meaning"), rows)


def alerts() -> str:
    """Table of every alert, its condition and the action."""
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    rows = [(rule["alert"], f"`{' '.join(rule['expr'].split())}`", rule["annotations"]["action"]) for rule in rules]
    return table(("alert", "when", "what to do"), rows)


def keys() -> str:
    """Sections for the tables of a run's TOML, each once, under all its names."""
    schema = Run.model_json_schema()
    names: dict[str, list[str]] = {}
    for name, kind in _tables(schema, schema["$defs"], ""):
        names.setdefault(kind, []).append(f"`[{name}]`")
    parts = [_section("Top level", schema)]
    parts += [_section(" and ".join(dict.fromkeys(found)), schema["$defs"][kind]) for kind, found in names.items()]
    return "\n".join(parts)


def importing_keys() -> str:
    """Sections for a TOML of `fit --restore-only`: what it has that other runs lack."""
    schema = RestoringRun.model_json_schema()
    return "\n".join([_section("Top level", schema), _section("`[imported]`", schema["$defs"]["Imported"])])


def own_keys(kind: type[ConditionalRun | NoisyRun]) -> str:
    """Sections for the TOML of a kind of run: the tables that a VAE's runs lack."""
    schema, known = kind.model_json_schema(), Run.model_json_schema()["$defs"]
    names: dict[str, list[str]] = {}
    for name, table_kind in _tables(schema, schema["$defs"], ""):
        if table_kind not in known:
            names.setdefault(table_kind, []).append(f"`[{name}]`")
    parts = [_section(" and ".join(found), schema["$defs"][table_kind]) for table_kind, found in names.items()]
    return "\n".join([_section("Top level", schema), *parts])


def _tables(schema: Schema, known: dict[str, Schema], above: str) -> Iterator[tuple[str, str]]:
    """Names of the nested tables, each with its type."""
    for key, value in schema["properties"].items():
        for kind in _kinds(value):
            yield f"{above}{key}", kind
            yield from _tables(known[kind], known, f"{above}{key}.")


def _kinds(value: Schema) -> list[str]:
    """Types of a table; empty for a plain key."""
    choices = value.get("oneOf") or value.get("anyOf") or [value]
    return [choice["$ref"].rpartition("/")[2] for choice in choices if "$ref" in choice]


def _section(title: str, schema: Schema) -> str:
    """Section of one table: heading, description, keys."""
    for key, value in schema["properties"].items():
        if "const" in value:
            title += f", `{key} = {json.dumps(value['const'])}`"
    rows = []
    for key, value in schema["properties"].items():
        needed = key in schema.get("required", ())
        default = value.get("default")
        shown = "required" if needed else "" if default is None or _kinds(value) else f"`{json.dumps(default)}`"
        rows.append((f"`{key}`", _kind(value), shown, " ".join(value.get("description", "").split())))
    return f"### {title}\n\n{schema['description']}\n\n{table(('key', 'type', 'default', 'meaning'), rows)}"


def _kind(value: Schema) -> str:
    """A key's type in TOML's terms."""
    if _kinds(value):
        return "table"
    choices = [choice for choice in value.get("anyOf", [value]) if choice.get("type") != "null"]
    if len(choices) > 1:
        return " or ".join(map(_kind, choices))
    (value,) = choices
    if "const" in value or "enum" in value:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in value.get("enum", [value.get("const")]))
    if value["type"] == "array":
        if "prefixItems" in value:
            return f"list of {len(value['prefixItems'])} {_kind(value['prefixItems'][0])}"
        return f"list of {_kind(value['items'])}"
    bounds = " and ".join(f"{sign} {value[bound]}" for bound, sign in BOUNDS.items() if bound in value)
    return f"{value['type']} {bounds}".strip()


def manifest_keys() -> str:
    """Every object of a manifest with its keys."""
    schema = manifest.Manifest.model_json_schema()
    kinds = {
        "Manifest": schema,
        **dict(sorted(schema["$defs"].items())),
    }
    parts = []
    for name, kind in kinds.items():
        rows = [
            (
                f"`{key}`",
                _json_type(value),
                "required" if key in kind.get("required", ()) else f"`{json.dumps(value['default'])}`",
                " ".join(value.get("description", "").split()),
            )
            for key, value in kind["properties"].items()
        ]
        parts.append(f"### {name}\n\n{kind['description']}\n\n{table(('key', 'type', 'default', 'meaning'), rows)}")
    return "\n".join(parts)


def _json_type(value: Schema) -> str:
    """A type of a manifest's JSON Schema in words."""
    if kinds := _kinds(value):
        return kinds[0]
    choices = [choice for choice in value.get("anyOf", [value]) if choice.get("type") != "null"]
    if len(choices) > 1:
        return " or ".join(_json_type(choice) for choice in choices)
    value = {**value, **choices[0]}
    if value["type"] == "array":
        return f"list of {_json_type(value['items'])}"
    if value["type"] == "object":
        inner = value.get("additionalProperties")
        return f"object of {_json_type(inner)}" if isinstance(inner, dict) else "object"
    return _kind(value)


def graphs() -> str:
    """The graphs that the service runs, with their tensors and the axes of these."""
    rows = [
        (f"`{name}.onnx`", signature.about, _tensors(signature.inputs), _tensors(signature.outputs))
        for name, signature in GRAPHS.items()
    ]
    return table(("graph", "gives", "inputs", "outputs"), rows)


def _tensors(tensors: Mapping[str, str]) -> str:
    return ", ".join(f"`{name} ({axes})`" if axes else f"`{name}`" for name, axes in tensors.items())


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "metrics": metrics,
    "alerts": alerts,
    "keys": keys,
    "conditional": lambda: own_keys(ConditionalRun),
    "noisy": lambda: own_keys(NoisyRun),
    "importing": importing_keys,
    "manifest": manifest_keys,
    "graphs": graphs,
}

if __name__ == "__main__":
    main()
