"""Figures of the source tree, each beside its aim: `make house`.

They are read from the source with `ast`; nothing is imported but `benchmarks.walk`, which counts the functions of one
request. The aims are no gates: no test fails on them.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

from benchmarks import walk

ROOT = Path(__file__).parents[1]
PACKAGES = ("service", "training")
OTHERS = ("client", "experiments")
"""Packages whose folders and words count, and whose classes do not."""

FLAT_FOLDER = 16
CLASSES = 180
IMPORT_DEPTH = 9
FILES_OF_A_REQUEST = 13
FUNCTIONS_OF_A_REQUEST = 40
SHOWN = 200
"""Docstrings that are printed at most."""

AVOIDED = (
    r"(?:is|are|was|were) (?:told|said|looked|asked|let|thought)", r"what (?:is|was) said", r"who(?:m|ever)?",
    r"gives? way", r"(?:no|some|any|every)body", r"as (?:it|they) comes?", r"tells?", r"told", r"says?", r"said",
    r"speaks? of", r"let go", r"strangers?", r"doors?",
)  # fmt: skip
"""Words that the first line of a docstring should not use: they name neither an action nor a term of the field."""
AVOID = re.compile(rf"\b(?:{'|'.join(AVOIDED)})\b", re.IGNORECASE)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(), str(path))


def sources(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    """Python files of some packages, sorted."""
    return sorted(path for package in packages for path in (root / package).rglob("*.py"))


def modules_by_folder(root: Path) -> Counter[str]:
    """How many modules lie directly in each folder."""
    return Counter(str(path.parent.relative_to(root)) for path in sources(root, PACKAGES + OTHERS))


def classes(root: Path) -> dict[str, list[str]]:
    """Places of every class and type alias, by name."""
    found = defaultdict(list)
    for path in sources(root):
        names = [node.name for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)]
        for name in [*names, *aliases(parsed(path))]:
            found[name].append(str(path.relative_to(root)))
    return found


def aliases(tree: ast.Module) -> Iterator[str]:
    """Type aliases of a module: `type X = ...`, and capitalised names that stand for a subscript, a union or a name."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            if re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", name) and not isinstance(value, ast.Constant | ast.Call):
                yield name
        elif type(node).__name__ == "TypeAlias":
            yield node.name.id  # type: ignore[attr-defined]


def imports(path: Path, root: Path) -> set[Path]:
    """Files of the same tree that a module imports at its top level."""
    found = set()
    for node in parsed(path).body:
        if isinstance(node, ast.Import):
            found |= {file_of(alias.name, root) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            whole = file_of(node.module, root)
            found |= {file_of(f"{node.module}.{alias.name}", root) or whole for alias in node.names}
    return {one for one in found if one is not None} - {path}


def file_of(module: str, root: Path) -> Path | None:
    """The file of a module of the tree; None for any other name."""
    path = root / module.replace(".", "/")
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()), None)


def import_chain(root: Path, package: str = "service") -> list[Path]:
    """The longest chain of modules of which each imports the next; an import that closes a circle is left out."""
    longest: dict[Path, list[Path]] = {}
    open_: set[Path] = set()

    def chain(path: Path) -> list[Path]:
        if path not in longest:
            open_.add(path)
            onward = [chain(one) for one in sorted(imports(path, root)) if one not in open_]
            open_.remove(path)
            longest[path] = [path, *max(onward, key=len, default=[])]
        return longest[path]

    return max((chain(path) for path in sources(root, (package,))), key=len)


def docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Place and first line of every docstring."""
    for path in sources(root, PACKAGES + OTHERS):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Module | ast.ClassDef | Function) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(root)}:{getattr(node, 'lineno', 1)}", text.splitlines()[0]


def functions(root: Path) -> list[tuple[int, str]]:
    """Lines and place of every function, shortest first; a docstring is not counted."""
    found = []
    for path in sources(root):
        for node in ast.walk(parsed(path)):
            if isinstance(node, Function):
                assert node.end_lineno is not None
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                found.append((lines, f"{path.relative_to(root)}:{node.lineno} {node.name}"))
    return sorted(found)


def report(root: Path) -> Iterator[str]:
    """The lines of the report."""
    folders, named = modules_by_folder(root), classes(root)
    (folder, most), lengths = folders.most_common(1)[0], functions(root)
    chain = import_chain(root)
    riddles = [(place, line) for place, line in docstrings(root) if AVOID.search(line)]
    twice = {name: places for name, places in sorted(named.items()) if len(places) > 1}
    yield f"{'':44}{'found':>8}{'aim':>8}"
    yield row("largest flat folder, modules", most, FLAT_FOLDER)
    yield row("classes and type aliases", sum(map(len, named.values())), CLASSES)
    yield row("longest chain of imports, modules", len(chain), IMPORT_DEPTH)
    files, calls = walk.walked()
    yield row("files of one warm encode", files, FILES_OF_A_REQUEST)
    yield row("functions of one warm encode", calls, FUNCTIONS_OF_A_REQUEST)
    yield row("names of two classes or aliases", len(twice), 0)
    yield row("docstrings with words to avoid", len(riddles), 0)
    yield row("longest function, lines", lengths[-1][0], None)
    yield row("median function, lines", int(median(lines for lines, _ in lengths)), None)
    yield f"\nlargest folder: {folder}; longest function: {lengths[-1][1]}"
    yield "longest chain: " + " > ".join(str(path.relative_to(root).with_suffix("")) for path in chain)
    yield "\nmodules by folder"
    yield from (f"  {number:4}  {name}" for name, number in sorted(folders.items()))
    yield "\nnames of two classes or aliases"
    yield from (f"  {name}: {', '.join(places)}" for name, places in twice.items())
    yield f"\ndocstrings with words to avoid{f', the first {SHOWN}' if len(riddles) > SHOWN else ''}"
    yield from (f"  {place}  {line}" for place, line in riddles[:SHOWN])


def row(what: str, found: int, aim: int | None) -> str:
    """One figure and its aim."""
    return f"{what:44}{found:8}{'' if aim is None else aim:>8}"


if __name__ == "__main__":
    print(*report(ROOT), sep="\n")
