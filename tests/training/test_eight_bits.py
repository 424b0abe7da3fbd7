"""Convolutions of eight bits: what they compute, and that onnxruntime computes it with whole numbers."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from training.export.weights import weights_in
from training.networks.eight_bits import LEVELS, EightBitConv2d, Rounded, stored, trainable
from training.networks.trunk import PlainResidual, TrunkSettings


def seen(module: nn.Module, *inputs: Tensor) -> nn.Module:
    """The module after minibatches that its ranges come from, in evaluation mode."""
    module.train()
    for _ in range(3):
        module(*inputs)
    return module.eval()


def test_activations_are_rounded_to_levels_of_half_their_range() -> None:
    """Of -2 to 6, so of -1 to 3: 0 stays 0, others move by half a level at most, and those outside become the ends."""
    rounded = seen(Rounded(), torch.tensor([-2.0, 6.0]))
    x = torch.linspace(-1.0, 3.0, 1001)
    step = 4.0 / LEVELS
    found = rounded(x)
    assert float((found - x).abs().max()) <= 0.5 * step + 1e-6
    assert len(found.unique()) == LEVELS + 1
    assert float(rounded(torch.zeros(1))) == 0.0
    torch.testing.assert_close(rounded(torch.tensor([-5.0, 9.0])), torch.tensor([-1.0, 3.0]), atol=step, rtol=0.0)


def test_a_range_forgets_what_is_not_seen_again() -> None:
    """An outlier of one minibatch widens it for some hundred minibatches."""
    rounded = Rounded().train()
    rounded(torch.tensor([-1.0, 100.0]))
    for _ in range(3000):
        rounded(torch.tensor([-1.0, 4.0]))
    assert float(rounded.high) == pytest.approx(2.0)


def test_weights_are_rounded_by_channel_and_gradients_pass() -> None:
    """To 127 levels; the gradient is that of the convolution without rounding of weights."""
    torch.manual_seed(0)
    convolution = EightBitConv2d(2, 3, 3)
    with torch.no_grad():
        convolution.weight[1] *= 100.0
    x = torch.randn(1, 2, 8, 8)
    seen(convolution, x)
    (inner,) = stored(nn.Sequential(convolution))
    weight = inner.levels
    assert isinstance(weight, Tensor)
    assert weight.dtype == torch.int8
    assert [int(part.abs().max()) for part in weight] == [63, 63, 63]
    convolution(x).sum().backward()
    known = torch.autograd.functional.jacobian(
        lambda w: nn.functional.conv2d(convolution.given(x), w).sum(), convolution.weight.detach()
    )
    torch.testing.assert_close(convolution.weight.grad, known)


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    """A residual block whose ranges are those of standard normal inputs."""
    torch.manual_seed(1)
    block = PlainResidual(16, eight_bits=True)
    assert block.second.bias is not None
    nn.init.normal_(block.second.bias, std=0.1)  # a graph leaves out a bias of zeros
    return seen(block, torch.randn(4, 16, 24, 24))


@pytest.fixture(scope="module")
def graph(residual: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It as ONNX."""
    path = tmp_path_factory.mktemp("eight") / "block.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        program = torch.onnx.export(stored(residual), (torch.zeros(1, 16, 24, 24),), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    return path


def test_graphs_have_whole_numbers(residual: nn.Module, graph: Path, tmp_path: Path) -> None:
    """onnxruntime fuses both convolutions into those of whole numbers, and answers what training computes."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert fused.count("QLinearConv") == 2
    x = torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(2))
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        known = residual(x).numpy()
    level = float((residual.second.answer.high - residual.second.answer.low) / LEVELS)  # type: ignore[operator,union-attr]
    assert np.abs(answer - known).max() <= 1.01 * level
    assert np.abs(answer - known).mean() < 0.05 * level


def test_weights_are_read_back_for_training(residual: nn.Module, graph: Path) -> None:
    """Another block with the weights of a graph computes the same after minibatches that give it the same ranges."""
    again = PlainResidual(16, eight_bits=True)
    missing = again.load_state_dict(trainable(weights_in(graph)), strict=False).missing_keys
    assert {name.rpartition(".")[2] for name in missing} == {"low", "high"}
    for own, known in zip(again.buffers(), residual.buffers(), strict=True):
        own.copy_(known)
    x = torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), residual(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("eight_bits", "parts"),
    [(True, ("levels.0", "levels.1", "merged.0")), ((False, True), ("levels.1",))],
    ids=["all levels", "the coarser level"],
)
def test_a_trunk_has_eight_bits_at_its_levels(eight_bits: bool | tuple[bool, ...], parts: tuple[str, ...]) -> None:
    """Their convolutions and those down to them; neither the first, the last nor those that enlarge."""
    trunk = TrunkSettings(channels=(8, 16), blocks=1, eight_bits=eight_bits).build(1)
    names = {name for name, module in trunk.named_modules() if isinstance(module, EightBitConv2d)}
    assert names == {f"{part}.0.{place}" for part in parts for place in ("first", "second")} | {"down.0"}
