"""Optimisers by name: Adam, the paper's Adagrad, and Muon for weight matrices with Adam for all other parameters."""

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
"""Weights with fewer rows or columns than this, such as first and last convolutions, are trained by Adam."""


def build(settings: Optimisation, parameters: Iterable[nn.Parameter], *, capturable: bool = False) -> list[Optimizer]:
    """Make the optimisers of `settings.optimiser`; each parameter belongs to one of them.

    Args:
        settings: Which optimiser, and its learning rates.
        parameters: What they train.
        capturable: Make learning rates tensors that a CUDA graph reads, so that steps can be replayed; needs CUDA.
            Adagrad's stay numbers.
    """
    parameters = list(parameters)
    # fused: one kernel a step instead of one an operation and parameter.
    if settings.optimiser == "adagrad":
        fused = all(not p.is_cuda for p in parameters)  # which it only is on a CPU
        return [Adagrad(parameters, lr=settings.learning_rate, fused=fused)]

    def rate(value: float) -> Any:
        return torch.tensor(value, device="cuda") if capturable else value

    def adam(chosen: list[nn.Parameter]) -> Adam:
        return Adam(chosen, lr=rate(settings.learning_rate), fused=True, capturable=capturable)

    if settings.optimiser == "adam":
        return [adam(parameters)]
    matrices = [p for p in parameters if p.ndim > 1 and min(len(p), p[0].numel()) >= LEAST_SIDE]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    found: list[Optimizer] = [adam(others)] if others else []
    return [*found, Muon(matrices, lr=rate(settings.matrix_learning_rate))] if matrices else found


class Muon(Optimizer):
    """Momentum with nearly orthogonal steps: every direction of a weight matrix moves equally far.

    A convolution's weight (out, in, kh, kw) counts as the matrix (out, in kh kw); torch's own Muon takes none.
    Source: Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks".
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float | Tensor) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, _closure: Any = None) -> None:  # type: ignore[override]
        """Take one step along the stored gradients; matrices of one size are orthogonalised together."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter.grad)
            momenta = [self.state[p]["momentum"] for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1.0 - MOMENTUM)
            directions = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # noqa: SLF001
            alike: dict[torch.Size, list[int]] = {}
            for index, direction in enumerate(directions):
                alike.setdefault(direction.flatten(1).shape, []).append(index)
            for (rows, columns), indices in alike.items():
                even = orthogonalised(torch.stack([directions[index].flatten(1) for index in indices]))
                even *= group["lr"] * math.sqrt(max(1.0, rows / columns))
                for index, step in zip(indices, even, strict=True):
                    parameters[index].sub_(step.view(parameters[index].shape))


def orthogonalised(matrices: Tensor) -> Tensor:
    """Approximate U V^T for each M = U S V^T by a quintic Newton-Schulz iteration.

    Singular values come out between 0.7 and 1.2.

    Args:
        matrices: (k, m, n).

    Returns:
        The same shape.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x
