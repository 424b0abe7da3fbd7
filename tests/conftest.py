"""What tests of the trainer and of the service share."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from service.contract.manifest import digest, read
from service.runtime.session import Session
from training.config import load
from training.pipeline import Workshop

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
MODELS = Path(__file__).parent.parent / "models"
HEAD = """
<ir_version: 10, opset_import: ["" : 20]>
decoder (float[n, 2] z) => (float[n, 1, 28, 28] x_mean) {
    going = Constant <value = bool {1}> ()
"""
LOOP = """
    end = Loop ("", going, start) <body = forever (int64 k, bool on, float v) => (bool on_2, float w) {
        on_2 = Identity (on)
        w = Mul (v, v)
    }>
    rows = Shape <start = 0, end = 1> (z)
    image = Constant <value = int64[3] {1, 28, 28}> ()
    shape = Concat <axis = 0> (rows, image)
    x_mean = Expand (end, shape)
}
"""
ENDLESS = {
    "opened": f"{HEAD} start = Constant <value = float {{1.0}}> () {LOOP}",
    "run": f"{HEAD} start = ReduceSum <keepdims = 0> (z) {LOOP}",
}
FIGURES: list[str] = []
# Threads of small operations wait for each other by spinning: on cores that have other work, fifteen times slower.
torch.set_num_threads(1)
# A shell starts what runs in the background with SIGINT ignored; what a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine takes longer over an example than hypothesis allows by itself.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Where the real data lie."""
    folder = os.environ.get("VAE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set VAE_DATA to the folder that holds mnist/")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One file that needs the model of digits comes first and makes it, the others last: nobody waits for it."""
    needing = dict.fromkeys(item.path for item in items if "digits_models" in getattr(item, "fixturenames", ()))
    first = next(iter(needing), None)
    items.sort(key=lambda item: (item.path != first, item.path in needing))


@pytest.fixture(scope="session")
def figure() -> Callable[[str], None]:
    """A function that records a line for the summary of the run."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the recorded figures."""
    for line in FIGURES:
        terminalreporter.write_line(f"measured: {line}")


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Restore the signal handlers of this process, because the command lines install their own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def digits_models(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A model repository with one version of `digits`, trained, evaluated and exported for real; to be read alone.

    Made once for all processes that test.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "digits"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            make_digits(folder)
    return folder / "models"


def make_digits(folder: Path) -> None:
    """As `python -m training fit` does, in few epochs."""
    run = load(CONFIGS / "digits.toml")
    short = run.train.model_copy(update={"epochs": 10})
    assert run.restoration is not None
    restoration = run.restoration.model_copy(update={"train": run.restoration.train.model_copy(update={"epochs": 10})})
    run = run.model_copy(update={"train": short, "restoration": restoration, "tileable": True})
    Workshop.open(run, folder, folder / "run", torch.device("cpu")).fit(folder / "models")


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository of `mnist-2d` alone, which opens quickly; to be read alone: its folder is the project's."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "mnist-2d").symlink_to(MODELS / "mnist-2d")
    return folder


@pytest.fixture
def flat_models(tmp_path: Path) -> Path:
    """A model repository that a test may spoil: the shipped `mnist-2d`, small and quick to open, as version 1."""
    shutil.copytree(MODELS / "mnist-2d" / "1", tmp_path / "models" / "mnist-2d" / "1")
    return tmp_path / "models"


@pytest.fixture(scope="session")
def seal() -> Callable[..., None]:
    """A function that makes the manifest of a version's folder agree with its files, and changes what else is named."""

    def sealed(folder: Path, **changes: Any) -> None:
        content = {**json.loads((folder / "manifest.json").read_text()), **changes}
        data = (entry for graph in content["graphs"].values() for entry in graph.get("data", ()))
        for entry in (*content["graphs"].values(), *data, content["golden"]):
            entry["sha256"] = digest((folder / entry["file"]).read_bytes())
        (folder / "manifest.json").write_text(json.dumps(content))

    return sealed


@pytest.fixture(scope="session")
def brighter(seal: Callable[..., None]) -> Callable[..., Path]:
    """A function that puts a version into a repository whose images are brighter than those of version 1."""

    def added(models: Path, version: str, model: str = "mnist-2d") -> Path:
        folder = models / model / version
        shutil.copytree(MODELS / "mnist-2d" / "1", folder, dirs_exist_ok=True)
        graph = onnx.load(folder / "decoder.onnx")
        (bias,) = (tensor for tensor in graph.graph.initializer if tensor.name == "decoder.4.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1.0), bias.name))
        onnx.save(graph, folder / "decoder.onnx")
        with np.load(folder / "golden.npz") as file:
            golden = dict(file)
        described = read(folder).graphs["decoder"]
        decoder = Session((folder / "decoder.onnx").read_bytes(), "CPUExecutionProvider", 1, described)
        (golden["decoder/x_mean"],) = decoder(golden["decoder/z"])
        np.savez(folder / "golden.npz", **golden)
        seal(folder, name=model, version=version)
        return folder

    return added


@pytest.fixture(scope="session")
def hanging(seal: Callable[..., None]) -> Callable[[Path, str], None]:
    """A function that makes an endless loop of the decoder of `mnist-2d` in a folder.

    onnxruntime runs into it when the graph is `opened`, since it folds constants, or only when it is `run`.
    """

    def hung(folder: Path, when: str) -> None:
        decoder = onnx.parser.parse_model(ENDLESS[when])
        onnx.checker.check_model(decoder)
        onnx.save(decoder, folder / "decoder.onnx")
        seal(folder)

    return hung


@pytest.fixture(scope="session")
def onnx_file() -> Callable[..., Path]:
    """A function that writes an ONNX graph of one float32 input; axes of other inputs and outputs are unknown."""

    def written(
        path: Path, given: str, shape: list[Any], nodes: list[onnx.NodeProto], *made: str, **weights: np.ndarray
    ) -> Path:
        info, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
        constants = [onnx.numpy_helper.from_array(weight, name) for name, weight in weights.items()]
        outputs = [info(name, kind, ["n", None, None, None]) for name in made]
        graph = onnx.helper.make_graph(nodes, "test", [info(given, kind, shape)], outputs, constants)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        path.parent.mkdir(exist_ok=True)
        onnx.save(model, path)
        return path

    return written
