"""Who may know whom: rules on which everything else rests, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = {"service.calibration", "service.golden", "service.manifest", "service.observation", "service.pixels"}
BY_NAME = {"import_module", "__import__", "find_spec", "run_module"}


def sources(package: str) -> list[Path]:
    """Every Python file of a package."""
    found = sorted((ROOT / package).rglob("*.py"))
    assert len(found) > 5, f"where is {package}?"
    return found


def imported(path: Path) -> Iterator[str]:
    """What a file imports; see `imports`."""
    yield from imports(path.read_text(), path)


def imports(source: str, path: Path) -> Iterator[str]:
    """What a file imports anywhere, inside functions and by name too: `a.b` for `import a.b` and `from a.b import c`.

    `from a import b` is both `a` and `a.b`, for b may be a module.
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
    """The last part of a function's name."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def roots(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(path)}


def name_of(path: Path) -> str:
    """For the test's own name."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources("service"), ids=name_of)
def test_service_knows_neither_torch_nor_the_trainer(path: Path) -> None:
    """No file of the service imports torch, onnx or training, not even inside a function."""
    assert not roots(path) & {"torch", "torchvision", "onnx", "onnxscript", "training", "tests", "benchmarks"}


@pytest.mark.parametrize("path", sources("training"), ids=name_of)
def test_trainer_knows_of_the_service_what_they_share(path: Path) -> None:
    """The trainer imports those modules that hold what both must see alike, and nothing else of the service."""
    of_service = {".".join(name.split(".")[:2]) for name in imported(path) if name.split(".")[0] == "service"}
    assert of_service - {"service"} <= SHARED
    assert not roots(path) & {"fastapi", "uvicorn", "starlette", "tests", "benchmarks"}


def test_one_file_of_the_service_knows_onnxruntime() -> None:
    """service/session.py imports onnxruntime; no other file does."""
    assert [name_of(path) for path in sources("service") if "onnxruntime" in roots(path)] == ["service/session.py"]


def test_manifest_needs_the_standard_library_alone() -> None:
    """What writer and reader share imports nothing that must be installed."""
    assert roots(ROOT / "service" / "manifest.py") <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "path", [ROOT / "service" / name for name in ("batcher.py", "errors.py", "latent.py")], ids=name_of
)
def test_inner_layers_know_neither_http_nor_onnx(path: Path) -> None:
    """Batcher, errors and latents work without a web framework and without onnxruntime."""
    assert not roots(path) & {"fastapi", "starlette", "uvicorn", "httpx", "onnxruntime", "PIL"}


def test_a_clock_that_is_set_back_is_noticed_by_nobody() -> None:
    """No file of the service asks for the time of day: every deadline and duration is of a clock that only goes on.

    But for those that count rates, as their library does, and that stamp traces.
    """
    clocks = {"time": {"time", "time_ns", "localtime", "gmtime"}, "datetime": {"datetime", "date"}}
    for path in (one for one in sources("service") if one.name not in ("doors.py", "rates.py", "tracing.py")):
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
        "from ..vae import VAE\n"
    )
    found = set(imports(source, ROOT / "service" / "routes" / "imaginary.py"))
    assert {"torch", "numpy.linalg", "training.model", "onnx", "service.app", "service.vae"} <= found


def test_importing_the_service_brings_nothing_heavy() -> None:
    """In a fresh process, importing service.app leaves torch, training, onnx and scikit-learn out of sys.modules."""
    script = "import sys, service.app; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "service" in loaded
    assert not loaded & {"torch", "training", "onnx", "onnxscript", "sklearn", "scipy", "tqdm"}
