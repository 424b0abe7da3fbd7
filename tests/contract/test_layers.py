"""Which module may import which: rules on which everything else rests, read from the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import files, packages_distributions
from pathlib import Path

import pytest

from service.api import reply
from service.server import protocol

ROOT = Path(__file__).parents[2]
BY_NAME = {"import_module", "__import__", "find_spec", "run_module", "needed"}
OURS = {"service", "deploy", "training", "experiments", "benchmarks", "tests", "docs", "vae_client"}
ABSENT = "no_such_package"
"""A package that a test imports because it does not exist."""
EXTRAS = {
    "service/bulk/cluster.py": ["ray"],
    "service/bulk/files.py": ["bulk"],
    "service/bulk/run.py": ["bulk"],
    "service/bulk/shared.py": ["bulk"],
    "service/bulk/source.py": ["bulk"],
    "service/bulk/target.py": ["bulk"],
    "service/codecs/container.py": ["heic"],
    "service/repository/remote.py": ["remote"],
    "service/observability/tracing.py": ["tracing"],
    "training": ["train", "evaluation", "diffusers", "tensorboard"],
    "experiments": ["train", "evaluation"],
    "tests": ["train", "test"],
    "benchmarks": ["train", "test"],
    "docs": ["train", "test"],
}
"""The extras that a file or package may import, besides the dependencies that are always installed."""
ELSEWHERE = {
    "benchmarks/peers", "benchmarks/trainers", "docs/build.py", "tests/browser", "tests/clients/kserve",
    "tests/clients/kserve_storage", "tests/clients/kubernetes", "tests/clients/python", "tests/clients/triton",
}  # fmt: skip
"""Files, and folders with them, that run in environments of their own."""
KNOWS = {
    "contract": set(),
    "runtime": {"contract"},
    "operations": {"contract", "runtime"},
    "repository": {"contract", "runtime", "operations"},
    "codecs": {"contract"},
    "security": {"contract"},
    "observability": {"contract"},
    "api": {"contract", "runtime", "operations", "repository", "codecs", "observability"},
    "server": {"security", "observability"},
    "bulk": {"contract", "runtime", "operations", "repository", "codecs", "api"},
}
"""Which rooms of the service a room may import. The application and the command line may import every room."""
BASE = {path.stem for path in (ROOT / "service").glob("*.py")} - {"__init__", "__main__", "app"}
"""Modules beside the rooms. Every room may import them, but for `FEW`; they import no room."""
FEW = {"contract": set(), "runtime": {"errors", "process"}, "operations": {"errors"}, "codecs": {"errors"}}
"""The modules beside the rooms that these rooms may import: they take numbers and callbacks, not settings."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLIENT = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())["project"]
CLIENT_EXTRAS = {"PIL": "pictures", "tqdm": "progress", "pyarrow": "parquet", "shtab": "completion"}
"""What the client imports where it is needed, and the extra that brings it."""
PROVIDERS = packages_distributions()


def sources(package: str) -> list[Path]:
    """Every Python file of a package."""
    found = sorted((ROOT / package).rglob("*.py"))
    assert len(found) > 5, f"where is {package}?"
    return found


def imported(path: Path) -> Iterator[str]:
    """Yield what a file imports; see `imports`."""
    yield from imports(path.read_text(), path)


def imports(source: str, path: Path) -> Iterator[str]:
    """Yield what a source imports, inside functions and by name too: `a.b` for `import a.b` and `from a.b import c`.

    `from a import b` is both `a` and `a.b`, because b may be a module.
    """
    package = [*path.relative_to(ROOT).with_suffix("").parts[:-1]]
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node.func) in BY_NAME:
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def called(function: ast.expr) -> str:
    """Return the last part of a function's name."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def roots(path: Path) -> set[str]:
    """Return the top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(path)}


def name_of(path: Path) -> str:
    """Return a path for the name of a test."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources("service"), ids=name_of)
def test_service_knows_neither_torch_nor_the_trainer(path: Path) -> None:
    """No file of the service imports torch, onnx or training, not even inside a function."""
    assert not roots(path) & {"torch", "torchvision", "onnx", "onnxscript", "training", "tests", "benchmarks"}


def upward(path: Path) -> set[str]:
    """Return the rooms, and modules beside them, that a file of the service imports and may not."""
    room = path.relative_to(ROOT / "service").parts[0].removesuffix(".py")
    names = [name.split(".") for name in imported(path) if name.startswith("service.")]
    known = {name[1] for name in names} & (KNOWS.keys() | BASE | {"app"}) - {room}
    return set() if room in ("app", "__main__") else known - KNOWS.get(room, set()) - FEW.get(room, BASE)


def test_no_arrow_runs_upward() -> None:
    """A room of the service imports rooms below it alone; a new room needs its place in `KNOWS`."""
    rooms = {path.parent.name for path in (ROOT / "service").glob("*/__init__.py")}
    assert rooms == KNOWS.keys()
    found = {name_of(path): rooms for path in sources("service") if (rooms := upward(path))}
    assert found == {}


@pytest.mark.parametrize("path", sources("training"), ids=name_of)
def test_trainer_knows_of_the_service_what_they_share(path: Path) -> None:
    """The trainer imports `service.contract`, and nothing else of the service or of the experiments."""
    of_service = {name for name in imported(path) if name.split(".")[0] == "service"}
    assert {name for name in of_service if not name.startswith("service.contract")} <= {"service"}
    assert not roots(path) & {"fastapi", "uvicorn", "starlette", "tests", "benchmarks", "experiments"}


def test_one_file_of_the_service_knows_onnxruntime() -> None:
    """service/runtime/session.py imports onnxruntime; no other file does."""
    assert [name_of(path) for path in sources("service") if "onnxruntime" in roots(path)] == [
        "service/runtime/session.py"
    ]


@pytest.mark.parametrize("path", sources("service/contract"), ids=name_of)
def test_the_contract_needs_numpy_and_pydantic_alone(path: Path) -> None:
    """What trainer and service both know imports itself, numpy and pydantic; two files need one more package each."""
    foreign = {name for name in imported(path) if name.split(".")[0] not in sys.stdlib_module_names}
    needed = {name for name in foreign if not f"{name}.".startswith("service.contract.")} - {"service"}
    further = {"images.py": {"PIL"}, "signature.py": {"cryptography"}}
    allowed = {"numpy", "pydantic"} | further.get(path.name, set())
    assert {name.split(".")[0] for name in needed} <= allowed


@pytest.mark.parametrize("path", sources("client/vae_client"), ids=name_of)
def test_the_client_knows_neither_service_nor_trainer(path: Path) -> None:
    """It imports itself, httpx, numpy, and the packages of its extras."""
    foreign = {name for name in roots(path) if name not in sys.stdlib_module_names}
    assert foreign <= {"vae_client", "httpx", "numpy", *CLIENT_EXTRAS}


def test_the_client_needs_httpx_and_numpy_alone() -> None:
    """They are its dependencies; importing it, and its command line, loads no package of an extra."""
    assert [normal(re.split(r"[<>=]", line)[0]) for line in CLIENT["dependencies"]] == ["httpx", "numpy"]
    extras = CLIENT["optional-dependencies"]
    assert extras.keys() == {*CLIENT_EXTRAS.values(), "all"}
    assert extras["all"] == [f"vae-client[{','.join(name for name in extras if name != 'all')}]"]
    script = "import sys, vae_client.command; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "client", capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "vae_client" in loaded
    assert not loaded & {"service", "training", *CLIENT_EXTRAS}


@pytest.mark.parametrize("room", ["contract", "runtime", "operations", "bulk", "errors.py", "invoke.py", "progress.py"])
def test_inner_rooms_know_no_http(room: str) -> None:
    """Operations, what lies below them, `invoke` and bulk runs work without a web framework."""
    for path in (one for one in sources("service") if room in one.relative_to(ROOT / "service").parts):
        assert not roots(path) & {"fastapi", "starlette", "uvicorn", "httpx"}, name_of(path)


@pytest.mark.parametrize("path", sources("service/codecs"), ids=name_of)
def test_codecs_know_the_contract_alone(path: Path) -> None:
    """A wire format imports neither operations nor HTTP: of the service, `contract` and the errors."""
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("service.")}
    assert rooms <= {"codecs", "contract", "errors"}


def test_a_clock_that_is_set_back_is_noticed_by_nobody() -> None:
    """No file of the service asks for the time of day: every deadline and duration is of a clock that only goes on.

    But for those that count rates, as their library does, and that stamp traces.
    """
    clocks = {"time": {"time", "time_ns", "localtime", "gmtime"}, "datetime": {"datetime", "date"}}
    for path in (one for one in sources("service") if one.name not in ("middleware.py", "rates.py", "tracing.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.attr not in clocks.get(node.value.id, ()), name_of(path)
            if isinstance(node, ast.ImportFrom):
                assert not clocks.get(node.module or "", set()) & {alias.name for alias in node.names}, name_of(path)


def test_no_import_is_overlooked() -> None:
    """The rules above see an import inside a function, under another name, by name and relative."""
    source = (
        "def f():\n import torch as t\n from numpy.linalg import norm\n"
        "importlib.import_module('training.model')\n__import__('onnx')\nfrom service import app\n"
        "from ..codecs import npy\n"
    )
    found = set(imports(source, ROOT / "service" / "api" / "imaginary.py"))
    assert {"torch", "numpy.linalg", "training.model", "onnx", "service.app", "service.codecs.npy"} <= found


def normal(distribution: str) -> str:
    """A name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def declared(extras: list[str]) -> set[str]:
    """Distributions that are installed with these extras."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    own = [re.fullmatch(rf"{PROJECT['name']}\[(.*)\]", line) for line in lines]
    within = [extra for match in own if match for extra in match[1].split(",")]
    names = {normal(re.split(r"[\[=<>~!; ]", line)[0]) for line, match in zip(lines, own, strict=True) if not match}
    return names | (declared(within) if within else set())


@cache
def files_of(distribution: str) -> frozenset[str]:
    """What it has installed."""
    return frozenset(map(str, files(distribution) or ()))


def providers(name: str) -> set[str]:
    """The distributions of which any gives that module; none for a package that several share the folder of."""
    root, *further = name.split(".")
    known = set(PROVIDERS.get(root, [root]))
    while len(known) > 1 and further:
        path = "/".join([root, *further])
        found = {one for one in known if {f"{path}.py", f"{path}/__init__.py"} & files_of(one)}
        if found:
            return {normal(one) for one in found}
        further.pop()
    return set() if len(known) > 1 else {normal(one) for one in known}


def undeclared(path: Path) -> set[str]:
    """Modules that a file imports and nobody who follows pyproject.toml need have."""
    place = name_of(path)
    extras = EXTRAS.get(place, EXTRAS.get(place.split("/")[0], []))
    foreign = {name for name in imported(path) if name.split(".")[0] not in sys.stdlib_module_names | OURS | {ABSENT}}
    return {name for name in foreign if (known := providers(name)) and not known & declared(extras)}


@pytest.mark.parametrize("package", ["service", "training", "experiments", "tests", "benchmarks", "docs"])
def test_what_is_imported_is_declared(package: str) -> None:
    """By the dependencies, or by the extras that a file is for; what another package happens to bring may go."""
    found = {name_of(path): undeclared(path) for path in sorted((ROOT / package).rglob("*.py"))}
    assert found
    elsewhere = {path for path in found if {path, path.rpartition("/")[0]} & ELSEWHERE}
    missing = {path: names for path, names in found.items() if names and path not in elsewhere}
    assert missing == {}


def test_an_undeclared_import_is_found() -> None:
    """A shared folder, a module of another name than its distribution, and one that is not installed."""
    assert providers("opentelemetry") == set()
    assert providers("opentelemetry.trace.propagation") == {"opentelemetry-api"}
    assert providers("opentelemetry.sdk.trace.TracerProvider") == {"opentelemetry-sdk"}
    assert providers("google.protobuf.message.Message") == {"protobuf"}
    assert providers("yaml.safe_load") == {"pyyaml"}
    assert providers("nowhere.at_all") == {"nowhere"}
    assert "opentelemetry-sdk" in declared(["test"]) - declared([])


def test_what_is_declared_is_pinned() -> None:
    """Every dependency of every extra has its version in constraints.txt; that of `gpu` has onnxruntime's."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normal(line.split("==")[0]) for line in lines if "==" in line and not line.startswith("#")}
    assert declared(list(PROJECT["optional-dependencies"])) - pinned <= {"onnxruntime-gpu"}
    of_client = [line for lines in CLIENT["optional-dependencies"].values() for line in lines] + CLIENT["dependencies"]
    names = {normal(re.split(r"[\[<>=]", line)[0]) for line in of_client} - {CLIENT["name"]}
    assert names <= pinned


def test_importing_the_service_brings_nothing_heavy() -> None:
    """In a fresh process, importing service.app leaves torch, training, onnx and scikit-learn out of sys.modules."""
    script = "import sys, service.app; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "service" in loaded
    assert not loaded & {"torch", "training", "onnx", "onnxscript", "sklearn", "scipy", "tqdm"}


def test_server_and_faces_name_the_same_extension() -> None:
    """Neither room imports the other. With two names answers would be right, but sent and copied more slowly."""
    assert {reply.WHOLE} == protocol.EXTENSIONS.keys()
