"""Optimisers by name: Adam, the paper's Adagrad, and Muon for weight matrices with Adam for all else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Adam, Optimizer

if TYPE_CHECKING:
    from training.config import Optimisation

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MOMENTUM = 0.95
LEAST_SIDE = 5
"""A weight with fewer rows or columns than this is no matrix worth orthogonalising: first and last convolutions."""


def build(settings: Optimisation, parameters: Iterable[nn.Parameter]) -> list[Optimizer]:
    """The optimisers that share out the parameters, as `settings.optimiser` says."""
    parameters = list(parameters)
    # fused: one kernel a step instead of one an operation and parameter.
    if settings.optimiser == "adagrad":
        return [Adagrad(parameters, lr=settings.learning_rate, fused=True)]
    if settings.optimiser == "adam":
        return [Adam(parameters, lr=settings.learning_rate, fused=True)]
    matrices = [p for p in parameters if p.ndim > 1 and min(len(p), p[0].numel()) >= LEAST_SIDE]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    found: list[Optimizer] = [Adam(others, lr=settings.learning_rate, fused=True)] if others else []
    return [*found, Muon(matrices, lr=settings.matrix_learning_rate)] if matrices else found


class Muon(Optimizer):
    """Momentum whose step is made nearly orthogonal: every direction of a weight matrix moves as far.

    A convolution's weight (out, in, kh, kw) counts as the matrix (out, in kh kw); torch's own Muon takes none.
    Source: Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks".
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, _closure: Any = None) -> None:  # type: ignore[override]
        """One step along the gradients that `backward` left."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if gradient is None:
                    continue
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                momentum = state["momentum"].lerp_(gradient, 1.0 - MOMENTUM)
                direction = orthogonalised(gradient.lerp(momentum, MOMENTUM).flatten(1))
                rows, columns = direction.shape
                scale = math.sqrt(max(1.0, rows / columns))
                parameter.sub_(direction.view(parameter.shape), alpha=group["lr"] * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U V^T for matrix = U S V^T: singular values between 0.7 and 1.2, by a quintic Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
