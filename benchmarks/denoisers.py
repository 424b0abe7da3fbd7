"""Graphs that denoise photographs, for comparisons of speed: published networks with random weights, and photo's own.

The networks are written from their papers. What a graph costs does not depend on its weights, so they are random, and
nothing here says how well they denoise.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from benchmarks import arithmetic
from benchmarks.arithmetic import Total
from benchmarks.environments import ignored_home
from service.contract.graphs import IMAGE, LEVEL, Signature
from service.contract.images import Pixels
from training.export.export import Exportable, convert

SIGMA = 25.0 / 255.0
MULTIPLE = 8
"""Heights and widths are multiples of it: DRUNet halves them three times, and so does photo."""
CHECKED_SIDE = 32
CHANNELS = {"grey": 1, "colour": 3}
Feed = dict[str, Pixels]


class DnCNN(nn.Module):
    """DnCNN: the noise from a chain of convolutions, subtracted from the image.

    Source: Zhang et al. (2017), "Beyond a Gaussian denoiser", section III: 17 layers for a known level, 20 for an
    unknown one and for colour, each of 64 channels; batch normalisation in all but the first and the last.
    """

    def __init__(self, channels: int, layers: int, width: int = 64) -> None:
        super().__init__()
        inner = [
            part
            for _ in range(layers - 2)
            for part in (nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        ]
        first, last = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)
        self.noise = nn.Sequential(first, nn.ReLU(), *inner, last)

    def forward(self, y: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, h, w)."""
        found: Tensor = y - self.noise(y)
        return found


class Residual(nn.Module):
    """Residual block of DRUNet: two convolutions with a ReLU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) -> the same."""
        found: Tensor = x + self.second(torch.relu(self.first(x)))
        return found


class DRUNet(nn.Module):
    """DRUNet: a U-Net of residual blocks without biases, given a map of the noise's level.

    Source: Zhang et al. (2021), "Plug-and-play image restoration with deep denoiser prior", section 3.1: four scales of
    64, 128, 256 and 512 channels with four blocks each on the way down and up; strided and transposed convolutions of
    2 x 2 between them; skips are added.
    """

    def __init__(self, channels: int, widths: tuple[int, ...] = (64, 128, 256, 512), blocks: int = 4) -> None:
        super().__init__()

        def chain(width: int) -> nn.Sequential:
            return nn.Sequential(*(Residual(width) for _ in range(blocks)))

        pairs = list(pairwise(widths))
        self.head = nn.Conv2d(channels + 1, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(chain(width) for width in widths[:-1])
        self.shrink = nn.ModuleList(nn.Conv2d(wide, deep, 2, 2, bias=False) for wide, deep in pairs)
        self.body = chain(widths[-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(deep, wide, 2, 2, bias=False) for wide, deep in pairs)
        self.up = nn.ModuleList(chain(width) for width in widths[:-1])
        self.tail = nn.Conv2d(widths[0], channels, 3, padding=1, bias=False)

    def forward(self, y: Tensor, level: Tensor) -> Tensor:
        """y (n, c, h, w) and level (n, 1) -> (n, c, h, w)."""
        x = self.head(torch.cat([y, level[:, :, None, None].expand(-1, -1, *y.shape[-2:])], 1))
        skips = [x]
        for down, shrink in zip(self.down, self.shrink, strict=True):
            x = shrink(down(x))
            skips.append(x)
        x = self.body(x)
        for grow, up in zip(reversed(self.grow), reversed(self.up), strict=True):
            x = up(grow(x + skips.pop()))
        found: Tensor = self.tail(x + skips.pop())
        return found


class Denoiser(NamedTuple):
    """A graph in a file.

    Attributes:
        name: Of its row in the tables.
        kind: `grey` or `colour`.
        path: The ONNX file.
    """

    name: str
    kind: str
    path: Path

    def feed(self, side: int) -> Feed:
        """Inputs for one random image of side x side pixels."""
        shape = (1, CHANNELS[self.kind], side, side)
        known = {
            "y": np.random.default_rng(0).random(shape, np.float32),
            "mask": np.ones(shape, np.float32),
            "level": np.array([[SIGMA, 0.0]], np.float32),
        }
        axes = {one.name: one.type.tensor_type.shape.dim for one in onnx.load(self.path).graph.input}
        return {name: known[name][:, : axes[name][1].dim_value] if name == "level" else known[name] for name in axes}

    def cost(self, side: int) -> Total:
        """Operations and bytes for one image of side x side pixels."""
        shapes = {name: array.shape for name, array in self.feed(side).items()}
        return arithmetic.total(arithmetic.layers(onnx.load(self.path), shapes))


def denoisers(version: Path) -> list[Denoiser]:
    """The published networks; the restoration graphs of a version, as shipped and all in float32.

    Args:
        version: Folder of the version, with the variants grey and colour.
    """
    home = ignored_home() / "denoisers"
    home.mkdir(exist_ok=True)
    found: list[Denoiser] = []
    for name, kind, network in (
        ("DnCNN, 17 layers", "grey", DnCNN(1, 17)),
        ("DnCNN, 20 layers", "grey", DnCNN(1, 20)),
        ("DnCNN, 20 layers", "colour", DnCNN(3, 20)),
        ("DRUNet", "grey", DRUNet(1)),
        ("DRUNet", "colour", DRUNet(3)),
    ):
        found.append(Denoiser(name, kind, home / f"{name.partition(',')[0]}-{len(found)}.onnx"))
        onnx.save(exported(network, CHANNELS[kind]), found[-1].path)
    for kind, ending in (("grey", ""), ("colour", "-3")):
        shipped = version / f"restoration{ending}.onnx"
        alone = home / f"restoration{ending}.onnx"
        onnx.save(in_float32(onnx.load(shipped)), alone)
        found.append(Denoiser(version.parent.name, kind, shipped))
        found.append(Denoiser(f"{version.parent.name}, all in float32", kind, alone))
    return found


def exported(network: nn.Module, channels: int) -> ModelProto:
    """The ONNX graph of a network for images of any size, compared with torch."""
    torch.manual_seed(0)
    rows: dict[str, Tensor] = {"y": torch.rand(2, channels, CHECKED_SIDE, CHECKED_SIDE)}
    axes = {"y": IMAGE}
    if isinstance(network, DRUNet):
        rows["level"], axes["level"] = torch.full((2, 1), SIGMA), LEVEL
    about = {
        "input_shape": [channels, "height", "width"],
        "latent_shape": [],
        "noise_families": ["gaussian"],
        "size": {"multiple_of": MULTIPLE},
    }
    signature = Signature("E[x|y]", axes, {"restored": IMAGE})
    return convert("denoiser", Exportable(network, tuple(rows.values()), signature), about).model


def in_float32(model: ModelProto) -> ModelProto:
    """A graph without its quantisation: weights in float32, activations neither rounded nor clipped.

    Args:
        model: A graph of QuantizeLinear and DequantizeLinear; it is changed.

    Returns:
        The same graph object.
    """
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    same: dict[str, str] = {}
    for node in [node for node in model.graph.node if node.op_type == "DequantizeLinear"]:
        source = node.input[0]
        if source in weights:
            numbers = _dequantised(node, weights)
            model.graph.initializer.append(onnx.numpy_helper.from_array(numbers, node.output[0]))
        else:
            same[node.output[0]] = made[source].input[0]
        model.graph.node.remove(node)
    for node in [node for node in model.graph.node if node.op_type == "QuantizeLinear"]:
        model.graph.node.remove(node)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            while name in same:
                name = same[name]  # noqa: PLW2901  # one pair may follow another
            node.input[place] = name
    read = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)
    return model


def _dequantised(node: onnx.NodeProto, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Weights as a DequantizeLinear makes them, by tensor or by axis."""
    numbers, scale = weights[node.input[0]], weights[node.input[1]]
    zero = weights[node.input[2]] if len(node.input) > 2 else np.zeros_like(scale, numbers.dtype)
    axis = next((one.i for one in node.attribute if one.name == "axis"), 1)
    shape = [-1 if place == axis else 1 for place in range(numbers.ndim)] if scale.ndim else []
    found = (numbers.astype(np.int32) - zero.reshape(shape).astype(np.int32)) * scale.reshape(shape)
    return found.astype(np.float32)
