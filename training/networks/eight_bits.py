"""Convolutions whose inputs, weights and answers have eight bits: processors multiply these two to four times as fast.

They are rounded in training already, so that a network learns to be as good. Weights have seven bits, because
processors without VNNI add two products in 16 bits. Sums of products are exact. What lies between convolutions is not:
the last digit of a float may move a level, and with it many others, so that two processors' answers differ by what
rounding costs.
Source: Jacob et al. (2018), "Quantization and training of neural networks for efficient integer-arithmetic-only
inference", sections 2 and 3.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = 255
"""Largest level of an activation; the least is 0."""
WEIGHT_LEVELS = 63
"""Largest level of a weight; the least is -63."""
KEPT = 0.998
"""What is kept of a range for each minibatch that does not reach it."""
CLIPPED = 0.5
"""Part of the range of activations that has levels: levels twice as fine gain more than the few activations beyond it
lose, 0.15 dB on held-out photographs at sigma 25."""
LEAST_RANGE = 1e-3
LEAST_WEIGHT = 1e-8
OPSET = 18

Network = TypeVar("Network", bound=nn.Module)


class Rounded(nn.Module):
    """Activations rounded to 256 levels of half the range that they have had in training."""

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.full((), LEAST_RANGE))

    def forward(self, x: Tensor) -> Tensor:
        """The nearest levels, shaped like x; gradients pass where x is within the range."""
        if self.training:
            with torch.no_grad():
                low, high = x.aminmax()
                self.low.copy_(torch.minimum(KEPT * self.low, CLIPPED * low.float()))
                self.high.copy_(torch.maximum(KEPT * self.high, CLIPPED * high.float()).clamp(min=LEAST_RANGE))
        return _nearest(x.float(), *self.scale_and_zero())

    def scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """What a level stands for, and the level of 0."""
        scale = (self.high - self.low) / LEVELS
        return scale, (-self.low / scale).round()


class EightBitConv2d(nn.Conv2d):
    """A convolution of rounded activations with rounded weights.

    Args:
        answers: Whether its answer is rounded too. The next convolution rounds what only it takes.
        *shape: As of `nn.Conv2d`.
        **options: Likewise.
    """

    def __init__(self, *shape: Any, answers: bool = False, **options: Any) -> None:
        super().__init__(*shape, **options)
        self.given = Rounded()
        self.answer = Rounded() if answers else nn.Identity()

    def scale_and_levels(self) -> tuple[Tensor, Tensor]:
        """What a level of the weights stands for by output channel, (out, 1, 1, 1), and the weights as levels."""
        weight = self.weight.detach()
        scale = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=LEAST_WEIGHT) / WEIGHT_LEVELS
        return scale, (weight / scale).round()

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) -> (n, out, h', w')."""
        scale, levels = self.scale_and_levels()
        rounded = self.weight + (levels * scale - self.weight).detach()
        found: Tensor = self.answer(functional.conv2d(self.given(x), rounded, self.bias, self.stride, self.padding))
        return found


class StoredRounding(nn.Module):
    """`Rounded` as a graph has it: QuantizeLinear and DequantizeLinear."""

    scale: Tensor
    zero: Tensor

    def __init__(self, of: Rounded) -> None:
        super().__init__()
        scale, zero = of.scale_and_zero()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """The nearest levels, shaped like x."""
        if torch.compiler.is_exporting():
            levels = _operator("QuantizeLinear", (x, self.scale, self.zero), x, torch.uint8)
            return _operator("DequantizeLinear", (levels, self.scale, self.zero), x, torch.float32)
        return _nearest(x, self.scale, self.zero)


class StoredConv2d(nn.Module):
    """`EightBitConv2d` as a graph has it, with weights as levels."""

    scale: Tensor
    levels: Tensor
    zero: Tensor

    def __init__(self, of: EightBitConv2d) -> None:
        super().__init__()
        self.stride, self.padding, self.bias = of.stride, of.padding, of.bias
        scale, levels = of.scale_and_levels()
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("levels", levels.to(torch.int8))
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int8))
        self.given = StoredRounding(of.given)
        self.answer = StoredRounding(of.answer) if isinstance(of.answer, Rounded) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) -> (n, out, h', w')."""
        if torch.compiler.is_exporting():
            weight = _operator(
                "DequantizeLinear", (self.levels, self.scale, self.zero), self.levels, torch.float32, axis=0
            )
        else:
            weight = self.levels.float() * self.scale[:, None, None, None]
        found: Tensor = self.answer(functional.conv2d(self.given(x), weight, self.bias, self.stride, self.padding))
        return found


def stored(network: Network) -> Network:
    """A copy for inference, whose convolutions of eight bits are as graphs have them."""
    own = copy.deepcopy(network)
    for module in list(own.modules()):
        for name, child in module.named_children():
            if isinstance(child, EightBitConv2d):
                setattr(module, name, StoredConv2d(child))
    return own.eval()


def trainable(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of networks as they are trained, rounded, of those of `stored` networks by name.

    Ranges are left out, because the first minibatch gives them. Other weights stay as they are.
    """
    found = {}
    for name, weight in weights.items():
        own, _, kind = name.rpartition(".")
        rounded = f"{own}.levels" in weights
        if rounded and kind == "levels":
            found[f"{own}.weight"] = weight * weights[f"{own}.scale"][:, None, None, None]
        elif not (rounded and kind in ("scale", "zero")) and not own.endswith((".given", ".answer")):
            found[name] = weight
    return found


def _nearest(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale, zero.to(torch.int32), 0, LEVELS)


def _operator(name: str, inputs: tuple[Tensor, ...], like: Tensor, dtype: torch.dtype, **attributes: Any) -> Tensor:
    found: Tensor = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=like.shape, version=OPSET)
    return found
