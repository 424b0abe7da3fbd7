"""Graphs of a version: whatever the order in its files, each tensor is served under its own name."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service.contract.graphs import GRAPHS, free_axes, shape_of
from service.contract.manifest import Graph, parse
from service.errors import StartError
from service.process import trim_heap
from service.repository.version import open_model
from service.runtime.model import Model
from service.runtime.session import Session

CPU = "CPUExecutionProvider"
X = np.random.default_rng(0).random((3, 1, 28, 28), np.float32)
SUBTRACTION = """
<ir_version: 10, opset_import: ["" : 20]>
subtraction (float[n] {0}, float[n] {1}) => (float[n] {2}, float[n] {3}) {{
    difference = Sub (left, right)
    sum = Add (left, right)
}}
"""
DESCRIBED = Graph(
    file="subtraction.onnx",
    sha256="0" * 64,
    inputs={"left": [], "right": []},
    outputs={"difference": [], "sum": []},
)
POOLS, SIDE = 12, 3072
MEANS = f"""
<ir_version: 10, opset_import: ["" : 20]>
means (float[n, 1, height, width] x0) => (float[n, 1, height, width] x{POOLS}) {{
{" ".join(f"x{k + 1} = AveragePool <kernel_shape=[3, 3], pads=[1, 1, 1, 1]> (x{k})" for k in range(POOLS))}
}}
"""
FREE: list[int | str] = [1, "height", "width"]
MEANS_DESCRIBED = Graph(file="means.onnx", sha256="0" * 64, inputs={"x0": FREE}, outputs={f"x{POOLS}": FREE})


def opened(folder: Path) -> Model:
    return open_model(folder, CPU, 1, 8)


def swap_in_graph(folder: Path) -> None:
    """The encoder's ONNX graph lists log_var before mean."""
    graph = onnx.load(folder / "encoder.onnx")
    mean, log_var = (onnx.ValueInfoProto.FromString(one.SerializeToString()) for one in graph.graph.output)
    del graph.graph.output[:]
    graph.graph.output.extend([log_var, mean])
    onnx.save(graph, folder / "encoder.onnx")


def swap_in_manifest(folder: Path) -> None:
    """The manifest lists log_var before mean."""
    content = json.loads((folder / "manifest.json").read_text())
    encoder = content["graphs"]["encoder"]
    encoder["outputs"] = dict(reversed(encoder["outputs"].items()))
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize("swap", [swap_in_graph, swap_in_manifest])
def test_swapped_outputs_of_an_encoder_are_served_under_their_names(
    flat_models: Path, seal: Callable[..., None], swap: Callable[[Path], None]
) -> None:
    """The mean and the log variance are those of the version before, and so differ from each other."""
    folder = flat_models / "mnist-2d" / "1"
    mean, log_var = opened(folder).graphs["encoder"](X)
    assert not np.array_equal(mean, log_var)
    swap(folder)
    seal(folder)
    again = opened(folder).graphs["encoder"](X)
    np.testing.assert_array_equal(again[0], mean)
    np.testing.assert_array_equal(again[1], log_var)


@pytest.mark.parametrize("inputs", [("left", "right"), ("right", "left")])
@pytest.mark.parametrize("outputs", [("difference", "sum"), ("sum", "difference")])
def test_a_session_binds_tensors_by_name(inputs: tuple[str, str], outputs: tuple[str, str]) -> None:
    """Whatever the order in the ONNX graph, arrays go in and come out in the manifest's."""
    graph = onnx.parser.parse_model(SUBTRACTION.format(*inputs, *outputs))
    session = Session(graph.SerializeToString(), CPU, 1, DESCRIBED)
    difference, total = session(np.array([5.0], np.float32), np.array([3.0], np.float32))
    assert (float(difference[0]), float(total[0])) == (2.0, 8.0)


def test_the_tensors_of_a_run_take_the_memory_of_those_before() -> None:
    """Of a graph of images of free size: the system gives pages for a few of 13 tensors, and has them back after."""
    session = Session(onnx.parser.parse_model(MEANS).SerializeToString(), CPU, 1, MEANS_DESCRIBED)
    x = np.ones((1, 1, SIDE, SIDE), np.float32)
    tensor = x.nbytes // resource.getpagesize()
    before, faults = resident_pages(), resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    (mean,) = session(x)
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - faults
    assert mean[0, 0, SIDE // 2, SIDE // 2] == pytest.approx(1.0)
    assert faults < 5 * tensor
    del mean
    trim_heap()  # it may have had a gap for these tensors, left by other tests
    assert resident_pages() - before < tensor // 2


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_a_tensor_of_another_name_is_refused() -> None:
    """The message names both."""
    graph = onnx.parser.parse_model(SUBTRACTION.format("left", "right", "difference", "sum"))
    other = DESCRIBED.model_copy(update={"outputs": {"difference": [], "total": []}})
    with pytest.raises(StartError, match=r"outputs are \[difference, sum\], in the manifest \[difference, total\]"):
        Session(graph.SerializeToString(), CPU, 1, other)


def test_a_manifest_has_tensors_in_the_order_of_the_signatures(flat_models: Path) -> None:
    """Whatever the order in its file."""
    content: dict[str, Any] = json.loads((flat_models / "mnist-2d" / "1" / "manifest.json").read_text())
    for entry in content["graphs"].values():
        entry["outputs"] = dict(reversed(entry["outputs"].items()))
    for name, graph in parse(json.dumps(content).encode()).graphs.items():
        assert list(graph.inputs) == list(GRAPHS[name].inputs)
        assert list(graph.outputs) == list(GRAPHS[name].outputs)


def test_axes_become_shapes() -> None:
    """By hand: images of 3 x 8 x 6, five latents or a latent map, two noise families."""
    vectors = {axes: shape_of(axes, [3, 8, 6], [5], 2) for axes in ("channels height width", "*latent", "*noise", "")}
    assert vectors == {"channels height width": [3, 8, 6], "*latent": [5], "*noise": None, "": []}
    refinement = GRAPHS["refinement"].inputs
    assert shape_of(refinement["q_mean"], [3, 8, 6], [5], 2) == [7]
    assert shape_of(refinement["q_mean"], [3, 8, 6], [4, 2, 2], 2) is None
    assert shape_of(refinement["rows"], [3, 8, 6], [5], 2) == [8, 8]
    assert shape_of(GRAPHS["decoder"].inputs["z"], [3, 8, 6], [4, 2, 2], 2) == [4, 2, 2]
    assert free_axes(refinement)["columns"] == {1: "seen_width"}
    assert free_axes(refinement).keys() == {"y", "mask", "rows", "columns"}
