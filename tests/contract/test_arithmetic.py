"""Operations and bytes of graphs, as the benchmarks count them, beside published figures and the closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from benchmarks.arithmetic import Layer, layers, total
from benchmarks.denoisers import DnCNN, DRUNet, exported, in_float32
from benchmarks.roofline import Peaks

OPSET = [helper.make_opsetid("", 20)]
GREY, COLOUR = 1, 3


def graph(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[int | str | None]
) -> onnx.ModelProto:
    """A graph from x, of this shape, to y."""
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    held = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    return helper.make_model(
        helper.make_graph(nodes, "counted", inputs, outputs, held), opset_imports=OPSET, ir_version=9
    )


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("node", "weight", "shape", "flop", "read", "written"),
    [
        # 5 outputs of 7 products each, for 3 rows.
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), (5, 7), (3, 7), 2 * 3 * 5 * 7, 3 * 7, 3 * 5),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (7, 5), (3, 7), 2 * 3 * 5 * 7, 3 * 7, 3 * 5),
        # 4 x 6 places of 8 channels, each a sum over 2 channels of 3 x 3: the 4 input channels are in two groups.
        (
            helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4, group=2),
            (8, 2, 3, 3), (1, 4, 4, 6), 2 * 4 * 6 * 8 * 2 * 9, 4 * 4 * 6, 8 * 4 * 6,
        ),
        # Each of the 4 x 6 x 3 numbers read is multiplied by a kernel of 2 x 2 for 5 channels.
        (
            helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
            (3, 5, 2, 2), (1, 3, 4, 6), 2 * 4 * 6 * 3 * 5 * 4, 3 * 4 * 6, 5 * 8 * 12,
        ),
    ],
)  # fmt: skip
def test_operations_and_bytes_of_a_layer(
    node: onnx.NodeProto, weight: tuple[int, ...], shape: tuple[int, ...], flop: int, read: int, written: int
) -> None:
    """Two operations a product; four bytes a number. The batch axis may be free."""
    model = graph([node], {"w": floats(*weight)}, ["n", *shape[1:]])
    assert layers(model, {"x": shape}) == [Layer(flop, False, 4 * int(np.prod(weight)), 4 * (read + written))]


def quantised(zero: int = 0) -> onnx.ModelProto:
    """A convolution in int8 with a ReLU, and one in float32 behind it, whose weights are stored in float16.

    The levels have seven bits, because processors without VNNI add two products in 16 bits.
    """
    weights = {
        "scale": np.array(0.05, np.float32),
        "middle": np.array(128, np.uint8),
        "zero": np.array(zero, np.uint8),
        "levels": np.random.default_rng(1).integers(-63, 64, (8, 4, 3, 3)).astype(np.int8),
        "steps": np.full(8, 0.002, np.float32),
        "none": np.zeros(8, np.int8),
        "half": floats(2, 8, 1, 1).astype(np.float16),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "middle"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "middle"], ["xd"]),
        helper.make_node("DequantizeLinear", ["levels", "steps", "none"], ["w"], axis=0),
        helper.make_node("Conv", ["xd", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "scale", "zero"], ["rq"]),
        helper.make_node("DequantizeLinear", ["rq", "scale", "zero"], ["rd"]),
        helper.make_node("Cast", ["half"], ["v"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Conv", ["rd", "v"], ["y"]),
    ]
    return graph(nodes, weights, [1, 4, 6, 6])


def test_a_layer_between_quantisations_is_in_int8() -> None:
    """It has one byte a number; the next one is in float32, with four, although its weights are stored in float16."""
    first = Layer(2 * 36 * 8 * 4 * 9, True, 8 * 4 * 9, 36 * (4 + 8))
    second = Layer(2 * 36 * 2 * 8, False, 4 * 2 * 8, 4 * 36 * (8 + 2))
    found = layers(quantised(), {"x": (1, 4, 6, 6)})
    assert found == [first, second]
    assert total(found).eight_bits == first.flop
    assert total(found).bytes == first.bytes + second.bytes


@pytest.mark.parametrize("zero", [0, 128])
def test_onnxruntime_fuses_what_counts_as_int8(tmp_path: Path, zero: int) -> None:
    """In the graph that it runs, the first convolution is a QLinearConv, unless the ReLU changes its levels."""
    options, model = ort.SessionOptions(), quantised(zero)
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    made = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
    assert made.count("QLinearConv") == sum(one.eight_bits for one in layers(model, {"x": (1, 4, 6, 6)})) == (zero == 0)


def test_shapes_that_do_not_follow_are_errors() -> None:
    """A missing input is named, and so is a tensor whose shape depends on values."""
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": floats(7, 5)}, ["n", 7])
    with pytest.raises(ValueError, match="the input x needs a shape"):
        layers(model, {})
    nodes = [
        helper.make_node("Compress", ["x", "which"], ["part"], axis=0),
        helper.make_node("MatMul", ["part", "w"], ["y"]),
    ]
    model = graph(nodes, {"w": floats(7, 5), "which": np.array([True, False])}, [2, 7])
    with pytest.raises(ValueError, match="the shape of part does not follow"):
        layers(model, {"x": (2, 7)})


def test_a_graph_without_its_quantisation() -> None:
    """It has the same operations, none in int8, and differs by no more than the roundings."""
    model, x = quantised(), floats(1, 4, 6, 6)
    before = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    operations = total(layers(model, {"x": x.shape})).flop
    plain = in_float32(model)
    found = total(layers(plain, {"x": x.shape}))
    assert (found.flop, found.eight_bits) == (operations, 0)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in plain.graph.node}
    after = ort.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert 0.0 < np.abs(after - before).max() < 0.05 * np.abs(after).max()


@pytest.mark.parametrize(
    ("network", "millions"),
    [(DnCNN(GREY, 17), 0.556), (DnCNN(GREY, 20), 0.667), (DnCNN(COLOUR, 20), 0.669), (DRUNet(GREY), 32.64)],
    ids=["DnCNN-S", "DnCNN-B", "CDnCNN-B", "DRUNet"],
)
def test_networks_have_the_published_number_of_parameters(network: torch.nn.Module, millions: float) -> None:
    """In millions, of the authors' own models (KAIR); the two of batch normalisation in each channel included."""
    assert sum(weight.numel() for weight in network.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_drunet_costs_what_its_followers_quote() -> None:
    """143.5 G multiplications for 256 x 256 pixels. The export compares onnxruntime with torch."""
    model = exported(DRUNet(COLOUR, blocks=4), COLOUR)
    found = total(layers(model, {"y": (1, COLOUR, 256, 256), "level": (1, 1)}))
    assert found.flop / 2e9 == pytest.approx(143.5, rel=0.04)


def test_the_time_of_the_roof() -> None:
    """The longer of operations and bytes, layer by layer, from the cache that holds them."""
    peaks = Peaks({"float32, a": 50.0, "float32, b": 100.0, "int8, a": 400.0}, {"L2": 80.0, "memory": 10.0}, {"L2": 40})
    computed, moved = Layer(1000, False, 10, 10), Layer(400, True, 20, 100)
    # Weights of 30 bytes in all are in L2; activations of 100 bytes come from memory.
    assert peaks.least_s([computed, moved]) == pytest.approx((1000 / 100 + 20 / 80 + 100 / 10, 1000 / 100))
