"""Floating-point operations and bytes of an ONNX graph's convolutions and matrix products."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

import onnx
from onnx import ModelProto, NodeProto, numpy_helper

WEIGHTS = {
    "Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3,
    "Gemm": 1, "MatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3,
}  # fmt: skip
"""Operators that are counted, and the place of the weight, or of the second factor, among their inputs."""
INTEGER = ("ConvInteger", "QLinearConv", "MatMulInteger", "QLinearMatMul")
FLOAT_BYTES = 4
NO_ZERO = 2
"""Inputs of a QuantizeLinear without a zero point, which is 0 then."""


class Layer(NamedTuple):
    """One operator at one size of input.

    Attributes:
        flop: Floating-point or integer operations, two for a multiplication with its addition.
        eight_bits: Whether it computes in int8.
        weights: Bytes of its weights in memory: float32, or int8.
        activations: Bytes that it reads and writes besides.
    """

    flop: int
    eight_bits: bool
    weights: int
    activations: int

    @property
    def bytes(self) -> int:
        """Bytes that it reads and writes at least, each once."""
        return self.weights + self.activations


class Total(NamedTuple):
    """Sums over layers; `eight_bits` are the operations in int8, which `flop` contains."""

    flop: int
    eight_bits: int
    weights: int
    activations: int

    @property
    def bytes(self) -> int:
        """Bytes of weights and activations."""
        return self.weights + self.activations


def total(layers: Iterable[Layer]) -> Total:
    """Sums over layers."""
    found = list(layers)
    return Total(
        sum(one.flop for one in found),
        sum(one.flop for one in found if one.eight_bits),
        sum(one.weights for one in found),
        sum(one.activations for one in found),
    )


def layers(model: ModelProto, inputs: Mapping[str, Sequence[int]]) -> list[Layer]:
    """Count a graph's convolutions and matrix products.

    A layer between DequantizeLinear and QuantizeLinear counts as int8, because onnxruntime fuses the three. There may
    be a ReLU where the zero point is 0, because levels below it do not exist. Weights
    that are stored in float16 count as float32, because onnxruntime converts them when it opens the graph. Element-wise
    operators are not counted: most are fused, and they have few operations.

    Args:
        model: The graph. It is not changed.
        inputs: Shapes of its inputs by name.

    Raises:
        ValueError: An input has no shape here, or the shape of a layer's tensor does not follow from them.
    """
    shapes = _shapes(model, inputs)
    made = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    zeros = {tensor.name for tensor in model.graph.initializer if not numpy_helper.to_array(tensor).any()}

    def size(name: str) -> int:
        shape = shapes.get(name)
        if shape is None:
            raise ValueError(
                f"the shape of {name} does not follow from those of the inputs; fix the graph's other axes"
            )
        return math.prod(shape)

    found = []
    for node in model.graph.node:
        if node.op_type not in WEIGHTS:
            continue
        weight = node.input[WEIGHTS[node.op_type]]
        sizes = size(node.input[0]), size(weight), size(node.output[0])
        read, written = (node.op_type in INTEGER,) * 2
        if node.op_type not in INTEGER:
            read = all(name in made and made[name].op_type == "DequantizeLinear" for name in (node.input[0], weight))
            written = read and _quantised(node.output[0], readers, zeros)
        each = 1 if written else FLOAT_BYTES
        found.append(Layer(_flop(node, shapes, *sizes), written, each * sizes[1], each * (sizes[0] + sizes[2])))
    return found


def _flop(node: NodeProto, shapes: Mapping[str, Sequence[int]], read: int, weights: int, written: int) -> int:
    """Operations of a node, from the numbers that it reads, has as weights and writes."""
    shape = shapes[node.input[WEIGHTS[node.op_type]]]
    if node.op_type == "ConvTranspose":  # weights (in, out / groups, *kernel): each number read meets out * kernel
        return 2 * read * math.prod(shape[1:])
    if "Conv" in node.op_type:  # weights (out, in / groups, *kernel): each number written is a sum over in * kernel
        return 2 * written * math.prod(shape[1:])
    if node.op_type == "Gemm":
        return 2 * written * weights // shapes[node.output[0]][-1]
    return 2 * written * shapes[node.input[0]][-1]


def _quantised(
    name: str, readers: Mapping[str, Sequence[NodeProto]], zeros: Container[str], *, rectified: bool = False
) -> bool:
    """Whether a tensor is only read in order to quantise it, after a ReLU with one of the zero points `zeros`."""
    found = readers.get(name, ())
    return bool(found) and all(
        (not rectified or len(node.input) == NO_ZERO or node.input[NO_ZERO] in zeros)
        if node.op_type == "QuantizeLinear"
        else node.op_type == "Relu" and _quantised(node.output[0], readers, zeros, rectified=True)
        for node in found
    )


def _shapes(model: ModelProto, inputs: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that follow from those of the inputs."""
    own = ModelProto()
    own.CopyFrom(model)
    del own.graph.value_info[:]
    weights = {tensor.name for tensor in own.graph.initializer}
    for one in own.graph.input:
        if one.name in inputs:
            kind = one.type.tensor_type.elem_type
            one.CopyFrom(onnx.helper.make_tensor_value_info(one.name, kind, inputs[one.name]))
        elif one.name not in weights:
            raise ValueError(f"the input {one.name} needs a shape; there are those of {', '.join(inputs)}")
    for one in own.graph.output:  # its symbolic axes would stay
        one.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(own, strict_mode=True, data_prop=True).graph
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for one in (*graph.input, *graph.value_info, *graph.output):
        axes = one.type.tensor_type.shape.dim
        if one.type.tensor_type.HasField("shape") and all(axis.HasField("dim_value") for axis in axes):
            found[one.name] = tuple(axis.dim_value for axis in axes)
    return found
