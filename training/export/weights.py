"""Weights in float16: rounding them, storing them, and what the rounding costs. Computations stay in float32."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from service.contract.golden import deviation
from training.errors import ExportError

LEAST_FLOAT16 = 256
"""Numbers of the smallest weight that is stored in float16."""
HALF = ".float16"
"""Ending of the names of weights that are stored in float16."""
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
STORED = (onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)

Module = TypeVar("Module", bound=nn.Module)


def rounded(module: Module) -> Module:
    """A copy whose large weights are rounded to numbers that float16 holds.

    Args:
        module: Any module; its small weights, of fewer than `LEAST_FLOAT16` numbers, stay exact.

    Raises:
        ExportError: A weight is too large for float16.
    """
    own = copy.deepcopy(module)
    for key, weight in own.state_dict().items():
        if weight.is_floating_point() and weight.numel() >= LEAST_FLOAT16:
            half = weight.half()
            if not bool(half.isfinite().all()):
                raise ExportError(f"{key} has values beyond those of float16; store the weights in float32")
            weight.copy_(half)
    return own


def store_as_float16(model: onnx.ModelProto) -> None:
    """Store large weights that float16 holds exactly so, each with a node that converts it back.

    onnxruntime converts them once, when it opens the graph.
    """
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type not in FLOATS or math.prod(tensor.dims) < LEAST_FLOAT16:
            continue
        weight = onnx.numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = weight.astype(np.float16)
        if np.array_equal(half, weight):
            name, kind = tensor.name, tensor.data_type
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, name + HALF))
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=kind))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def without_float16(model: onnx.ModelProto) -> None:
    """Store weights in float32 again that `store_as_float16` has stored in float16."""
    halves = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    casts = [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in halves]
    for node in casts:
        kind = onnx.helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
        weight = onnx.numpy_helper.to_array(halves[node.input[0]]).astype(kind)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, node.output[0]))
        model.graph.node.remove(node)


def weights_in(path: Path) -> dict[str, Tensor]:
    """The weights of a graph that this trainer has written, by name, in float32; levels of eight bits too."""
    found = {}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type in (*FLOATS, *STORED):
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            found[tensor.name.removesuffix(HALF)] = torch.from_numpy(values)
    return found


@torch.no_grad()
def differences(
    module: nn.Module, exact: nn.Module, rows: tuple[Tensor, ...], outputs: Iterable[str]
) -> dict[str, float]:
    """Largest difference of each output between two modules on the same rows, as golden rows are compared.

    Args:
        module: The module with rounded weights.
        exact: The same with exact ones.
        rows: Inputs of both, one tensor (n, ...) each.
        outputs: Names of the outputs.
    """
    found, known = (tensors_of(one(*rows)) for one in (module, exact))
    return {
        name: deviation(name, *(tensor.cpu().numpy() for tensor in pair))
        for name, *pair in zip(outputs, found, known, strict=True)
    }


def tensors_of(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of a module that returns one tensor or several."""
    return tuple(value) if isinstance(value, tuple) else (value,)
