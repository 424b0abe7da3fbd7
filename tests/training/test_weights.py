"""Weights in float16: a run that stores them so, and what onnxruntime makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from service.contract import manifest
from service.contract.golden import deviation
from service.repository.version import open_model
from training.config import Run
from training.data import as_float
from training.errors import ExportError
from training.export.export import Exportable, convert, exportables
from training.export.weights import LEAST_FLOAT16, rounded, tensors_of
from training.models.restoration import Corrupted
from training.pipeline import Workshop

CPU = "CPUExecutionProvider"
RUN = Run.model_validate(
    {
        "name": "tiny",
        "data": {"dataset": "digits"},
        "model": {
            "latent_dim": 2,
            "prior": {"prior": "realnvp", "couplings": 2, "width": 32},
            "network": {"architecture": "mlp", "hidden": [64]},
        },
        "train": {"epochs": 1},
        "evaluation": {"draws": 2, "images": 20},
        "export": {"weights": "float16"},
    }
)


class Made(NamedTuple):
    """A version in float16, and the graphs of the same run with exact weights."""

    folder: Path
    exact: dict[str, Exportable]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run that takes a moment."""
    folder = tmp_path_factory.mktemp("weights")
    workshop = Workshop.open(RUN, folder, folder / "run", torch.device("cpu"))
    version = workshop.fit(folder / "models")
    seen = Corrupted(*(torch.zeros(1),) * 3)
    return Made(version, exportables(workshop.vae(), None, as_float(workshop.images.test[:4]), seen))


def test_the_manifest_tells_what_rounding_costs(made: Made) -> None:
    """The largest difference of each output between the version's golden rows and torch with exact weights."""
    told = manifest.read(made.folder).training
    assert told["stored"] == "float16"
    with np.load(made.folder / "golden.npz") as golden:
        for name, graph in manifest.read(made.folder).graphs.items():
            rows = (torch.from_numpy(golden[f"{name}/{key}"]) for key in graph.inputs)
            answers = tensors_of(made.exact[name].module(*rows))
            for key, answer in zip(graph.outputs, answers, strict=True):
                found = deviation(key, golden[f"{name}/{key}"], answer.detach().numpy())
                assert told["largest_rounding_error"][f"{name}/{key}"] == pytest.approx(found, rel=0.01)
    assert 1e-5 < max(told["largest_rounding_error"].values()) < 1e-2


def test_weights_are_converted_once_when_a_graph_is_opened(made: Made, tmp_path: Path) -> None:
    """The file shrinks; the optimised graph is that of float32 weights: no conversion is left in it."""
    whole = convert("log_joint", made.exact["log_joint"], {"input_shape": [1, 8, 8]}).model.SerializeToString()
    half = (made.folder / "log_joint.onnx").read_bytes()
    assert len(half) < 0.65 * len(whole)
    graphs = [optimised(content, tmp_path / "optimised.onnx") for content in (whole, half)]
    assert all(tensor.data_type != onnx.TensorProto.FLOAT16 for tensor in graphs[1].initializer)
    kinds = [Counter(node.op_type for node in graph.node) for graph in graphs]
    assert kinds[0] == kinds[1]


def optimised(content: bytes, path: Path) -> onnx.GraphProto:
    """The graph that onnxruntime runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(content, options, providers=[CPU])
    return onnx.load(path).graph


def test_a_version_in_float16_is_served(made: Made) -> None:
    """Its golden rows are those of the rounded weights, so the service replays them."""
    assert open_model(made.folder, CPU, 1, 4).manifest.training["stored"] == "float16"


def test_small_weights_stay_exact_and_large_values_are_refused() -> None:
    """Biases are not rounded, the module is left as it is, and a weight that would become infinite is named."""
    module = nn.Linear(LEAST_FLOAT16, 3)
    before = module.weight.clone()
    found = rounded(module)
    assert torch.equal(found.bias, module.bias)
    assert torch.equal(found.weight, before.half().float())
    assert torch.equal(module.weight, before)
    module.weight.data[0, 0] = 1e5
    with pytest.raises(ExportError, match="weight has values beyond those of float16"):
        rounded(module)
