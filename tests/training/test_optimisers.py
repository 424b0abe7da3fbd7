"""Muon, and which optimiser has which parameters."""

from __future__ import annotations

import torch
from torch import nn

from training.config import Optimisation
from training.loop.optimisers import Muon, build, orthogonalised


def muon_settings() -> Optimisation:
    """Of a run that asks for Muon."""
    return Optimisation(epochs=1, optimiser="muon", learning_rate=1e-3, matrix_learning_rate=0.02)


def test_orthogonalised_keeps_directions_and_evens_lengths() -> None:
    """Singular vectors stay, singular values of any size end near 1: wide, tall and square."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((8, 30), (30, 8), (12, 12)):
        matrix = torch.randn(shape, generator=generator) * 1e-3
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        inside = left.T @ orthogonalised(matrix[None])[0] @ right.T
        assert ((inside.diagonal() > 0.6) & (inside.diagonal() < 1.3)).all()
        assert (inside - inside.diagonal().diag()).abs().max() < 0.02


def test_all_parameters_have_one_optimiser() -> None:
    """Weight matrices and convolutions go to Muon; biases and convolutions from or to one channel to Adam."""
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 10))
    adam, muon = build(muon_settings(), network.parameters())
    assert isinstance(muon, Muon)
    names = {id(p): name for name, p in network.named_parameters()}
    held = [[names[id(p)] for group in o.param_groups for p in group["params"]] for o in (adam, muon)]
    assert held == [["0.bias", "1.bias", "3.bias"], ["0.weight", "1.weight", "3.weight"]]
    few = nn.Sequential(nn.Conv2d(4, 1, 1), nn.Linear(4, 4))
    (adam,) = build(muon_settings(), few.parameters())
    assert len(adam.param_groups[0]["params"]) == 4


def test_a_step_is_as_long_in_every_direction() -> None:
    """A gradient whose directions differ a thousandfold moves a matrix, or a convolution, as far along each."""
    generator = torch.Generator().manual_seed(2)
    for shape in ((6, 6), (6, 3, 2, 1)):
        weight = nn.Parameter(torch.zeros(shape))
        left, _, right = torch.linalg.svd(torch.randn(6, 6, generator=generator))
        weight.grad = (left @ torch.logspace(0, -2, 6).diag() @ right).view(shape)
        Muon([weight], lr=0.1).step()
        lengths = torch.linalg.svdvals(weight.detach().flatten(1))
        assert 0.05 < float(lengths.min()) <= float(lengths.max()) < 0.13
        assert (weight.detach() * weight.grad).sum() < 0


def test_the_layout_of_a_convolution_does_not_matter() -> None:
    """Channels last or first in memory: the same step."""
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        generator = torch.Generator().manual_seed(3)
        convolution = nn.Conv2d(8, 16, 3)
        with torch.no_grad():
            convolution.weight.copy_(torch.randn(16, 8, 3, 3, generator=generator))
        convolution = convolution.to(memory_format=layout)  # type: ignore[call-overload]
        gradient = torch.randn(16, 8, 3, 3, generator=generator)
        convolution.weight.grad = gradient.to(memory_format=layout)
        Muon([convolution.weight], lr=0.1).step()
        ends.append(convolution.weight.detach().contiguous())
    assert torch.allclose(ends[0], ends[1], atol=1e-6)
