"""A step of per-image variational inference as a graph: a bound on log p(y) of an observation, and its gradient.

The service refines a restored image by raising this bound, from the recognition model's posterior on. It needs no
torch: it runs the graph and follows the gradient itself. q(z, level | y) is a diagonal Gaussian over z and, where the
noise level is unknown, over its distance from the estimate on an unbounded scale.
Source: Kucukelbir et al. (2017), "Automatic differentiation variational inference", sections 2.3 to 2.5; per image:
Kim et al. (2018), "Semi-amortized variational autoencoders", section 2.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import default_decompositions
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from service.contract.corruption import FAMILIES, LEAST_VARIANCE
from training.distributions.gaussian import DiagonalGaussian
from training.distributions.noise import moved, noise_variance, replacement
from training.errors import ExportError
from training.models.restoration import Fusion
from training.models.vae import VAE

aten = torch.ops.aten
ACTIVATIONS = (
    aten.silu_backward.default,
    aten.sigmoid_backward.default,
    aten.tanh_backward.default,
    aten.softplus_backward.default,
    aten.threshold_backward.default,
    aten.slice_backward.default,
    aten.select_backward.default,
)
"""Gradients of the operators of decoders and priors, which ONNX lacks."""


JUDGED_AT = 0.5
"""Least noise level at which the variance of a pixel around the decoder's mean is taken. At lower levels the fusion
trusts the observed pixels and its variance says little about the decoder: z would fit every observed grey level at the
cost of missing pixels (0.9 dB for half an image).
"""


class Refinement(nn.Module):
    """One draw's bound on log p(y) for y observed of an image through an operator, and its gradient in q's parameters.

    The operator is separable: rows @ x @ columns^T, averages over places (the identity, means of blocks, a blur).
    Values are observed where mask is 1. A noise family that is not at work has level 0.
    """

    def __init__(self, vae: VAE, fusion: Fusion) -> None:
        super().__init__()
        self.vae, self.fusion = vae, fusion

    def forward(
        self,
        mean: Tensor,
        log_var: Tensor,
        eps: Tensor,
        *observation: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The bound, the level at the draw, and the bound's gradient.

        Args:
            mean: Mean of q (n, d + F), z first, then the families.
            log_var: Log variance of q likewise.
            eps: Standard normal noise of the draw likewise.
            *observation: y and mask (n, c, seen h, seen w); level and unknown (n, F), the second 1 where the level is
                to be inferred; rows (n, seen h, h); columns (n, seen w, w).

        Returns:
            elbo (n,) in nats, level (n, F), and the gradients of elbo in mean and log_var (n, d + F).
        """
        with torch.enable_grad():
            mean, log_var = (part.detach().requires_grad_() for part in (mean, log_var))
            elbo, drawn = self._elbo(DiagonalGaussian(mean, log_var), eps, *observation)
            in_mean, in_log_var = torch.autograd.grad(elbo.sum(), (mean, log_var))
        return elbo.detach().float(), drawn.detach(), in_mean, in_log_var

    def _elbo(
        self,
        q: DiagonalGaussian,
        eps: Tensor,
        y: Tensor,
        mask: Tensor,
        level: Tensor,
        unknown: Tensor,
        rows: Tensor,
        columns: Tensor,
    ) -> tuple[Tensor, Tensor]:
        d = q.mean.shape[1] - len(FAMILIES)
        of_z, of_level = (
            DiagonalGaussian(*parts) for parts in zip(*(t.split((d, len(FAMILIES)), 1) for t in q), strict=True)
        )
        z = of_z.draw(eps[:, :d])
        drawn = moved(level, unknown * of_level.draw(eps[:, d:]))
        x_mean = self.vae.x_mean(z)
        variance, logit = self.fusion.pixel_prior(x_mean, level.clamp(min=JUDGED_AT))
        seen, seen_variance = _through(rows, columns, x_mean), _through(rows.square(), columns.square(), variance)
        density = observation_density(seen, seen_variance, logit, y, drawn, self.fusion.extremes)
        # In double, as in Fusion: in float the last bit depends on the number of rows.
        log_prob = (torch.where(mask > 0.0, density, 1.0).double().log()).flatten(1).sum(1)
        kl_of_level = 0.5 * (unknown * (of_level.mean.square() + of_level.log_var.exp() - 1.0 - of_level.log_var)).sum(
            1
        )
        return log_prob - self.vae.prior.kl(of_z, z[None]) - kl_of_level, drawn


def observation_density(
    seen: Tensor, variance: Tensor, logit: Tensor, y: Tensor, level: Tensor, extremes: Tensor
) -> Tensor:
    """p(y | z, level) of every pixel: a density, or for 0 and 1 under replacing noise a probability.

    Args:
        seen: Mean of the observed pixels given z (n, c, h, w).
        variance: Their variance (n, c, h, w).
        logit: Logit of the weight of the uniform density (n, 1, 1, 1).
        y: Observed values (n, c, h, w).
        level: Noise level (n, F).
        extremes: As `Fusion.extremes`.
    """
    replacing = replacement(level)
    total = variance + noise_variance(level, seen) + LEAST_VARIANCE
    near = torch.exp(-(0.5 * (y - seen).square() / total).clamp(max=80.0)) / torch.sqrt(2.0 * torch.pi * total)
    anything = torch.sigmoid(logit)
    inside = replacing.kept * ((1.0 - anything) * near + anything)
    bright = reduce(add, replacing.white, replacing.kept * extremes[1] * seen)
    dark = reduce(add, replacing.black, replacing.kept * extremes[0] * (1.0 - seen))
    found = torch.where(replacing.at_work & (y >= 1.0), bright, inside)
    return torch.where(replacing.at_work & (y <= 0.0), dark, found).clamp(min=1e-30)


def _through(rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    """rows @ x @ columns^T of every channel."""
    return rows[:, None] @ x @ columns[:, None].mT


def differentiated(module: nn.Module, rows: tuple[Tensor, ...]) -> GraphModule:
    """The module with its gradients written out as plain operators, since the ONNX exporter takes no gradients.

    Args:
        module: Calls `torch.autograd.grad`.
        rows: Inputs to trace with. Axes of the same length are taken for the same axis, so axes that may differ must
            differ here.
    """
    known = default_decompositions()
    table: Any = {
        **{operator: known[operator] for operator in ACTIVATIONS},
        aten.convolution_backward.default: _convolution_backward,
    }
    trace = make_fx(module, decomposition_table=table, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    return trace(*rows)


def _convolution_backward(
    gradient: Tensor,
    _x: Tensor,
    weight: Tensor,
    _bias_sizes: object,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    _wanted: list[bool],
) -> tuple[Tensor, None, None]:
    """The gradient in the input alone, since weights are constants here."""
    if transposed or any(step != 1 for step in stride):
        raise ExportError(
            "convolutions of a decoder to be refined must have stride 1; enlarge by sub-pixel convolution"
        )
    spread = functional.conv_transpose2d(gradient, weight, None, stride, padding, output_padding, groups, dilation)
    return spread, None, None
