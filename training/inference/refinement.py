"""A step of per-image variational inference as a graph: a bound on log p(y) of an observation, and its gradient.

The service makes a restored image better by raising this bound from where the recognition model starts it, without
torch: it runs the graph and moves along the gradient itself. q(z, level | y) is a diagonal Gaussian over z and, where
the level of the noise is unknown, over how far it lies from its estimate, on a scale where every number is a level.
Source: Kucukelbir et al. (2017), "Automatic differentiation variational inference", sections 2.3 to 2.5; per image:
Kim et al. (2018), "Semi-amortized variational autoencoders", section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import default_decompositions
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from service.contract.corruption import LEAST_VARIANCE
from training.distributions.gaussian import DiagonalGaussian
from training.errors import ExportError
from training.models.restoration import FAMILIES, Fusion, noise_variance
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
"""Gradients of what decoders and priors are made of, which ONNX does not know."""


JUDGED_AT = 0.5
"""The least level of noise at which it is judged how far a pixel may be from the decoder's mean. Where there is hardly
any the fusion trusts what is seen, and its density says little of the decoder: held to it, z fits every grey level that
is seen and what is not seen suffers (half an image missing: by 0.9 dB).
"""


class Refinement(nn.Module):
    """One draw's bound on log p(y) for y seen of an image through an operator, and its gradient in q's parameters.

    The operator is separable: what is seen is rows @ x @ columns^T, averages over places (the identity, a box, a blur),
    and of that only where mask is 1. A family of noise that is not at work has level 0.
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
        """elbo (n,), level (n, F) at the draw, and the gradients of elbo in mean and log_var (n, d + F).

        An observation is y, mask, level, unknown, rows and columns.
        Shapes: mean, log_var and eps (n, d + F), z first, then the families; y and mask (n, c, seen h, seen w); level
        and unknown (n, F), 1 where it is to be inferred; rows (n, seen h, h), columns (n, seen w, w).
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
        drawn = _moved(level, unknown * of_level.draw(eps[:, d:]))
        x_mean = self.vae.x_mean(z)
        variance, logit = self.fusion.pixel_prior(x_mean, level.clamp(min=JUDGED_AT))
        seen, seen_variance = _through(rows, columns, x_mean), _through(rows.square(), columns.square(), variance)
        density = observation_density(seen, seen_variance, logit, y, drawn, self.fusion.extremes)
        # In double, as in Fusion: in float the last bit hangs on who shares the batch.
        log_prob = (torch.where(mask > 0.0, density, 1.0).double().log()).flatten(1).sum(1)
        kl_of_level = 0.5 * (unknown * (of_level.mean.square() + of_level.log_var.exp() - 1.0 - of_level.log_var)).sum(
            1
        )
        return log_prob - self.vae.prior.kl(of_z, z[None]) - kl_of_level, drawn


def observation_density(
    seen: Tensor, variance: Tensor, logit: Tensor, y: Tensor, level: Tensor, extremes: Tensor
) -> Tensor:
    """p(y | z, level) of every pixel, where the decoder says N(seen, variance) and, with a small weight, anything.

    A density for values that may be any number; for 0 and 1 under salt and pepper, or masking noise, a probability.
    Shapes: seen, variance and y (n, c, h, w); logit (n, 1, 1, 1) of the weight; level (n, F); extremes (2,).
    """
    flip, masking = (level[:, i, None, None, None] for i in (1, 2))
    total = variance + noise_variance(level, seen) + LEAST_VARIANCE
    near = torch.exp(-(0.5 * (y - seen).square() / total).clamp(max=80.0)) / torch.sqrt(2.0 * torch.pi * total)
    anything = torch.sigmoid(logit)
    kept = (1.0 - flip) * (1.0 - masking)
    inside = kept * ((1.0 - anything) * near + anything)
    flipped = 0.5 * flip * (1.0 - masking)
    bright = kept * extremes[1] * seen + flipped
    dark = kept * extremes[0] * (1.0 - seen) + flipped + masking
    switched = (flip + masking) > 0.0
    found = torch.where(switched & (y >= 1.0), bright, inside)
    return torch.where(switched & (y <= 0.0), dark, found).clamp(min=1e-30)


def _moved(level: Tensor, by: Tensor) -> Tensor:
    """The level `by` further on its unbounded scale: logarithm for a standard deviation, logit for a share."""
    grown = level * by.exp()
    shares = grown / (1.0 - level + grown)
    return torch.cat([grown[:, :1], shares[:, 1:3], grown[:, 3:]], 1)


def _through(rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    """rows @ x @ columns^T of every channel."""
    return rows[:, None] @ x @ columns[:, None].mT


def differentiated(module: nn.Module, rows: tuple[Tensor, ...]) -> GraphModule:
    """The module with its gradients written out as plain operators, for any number of rows: what ONNX can hold.

    The exporter takes no gradients. Axes of `rows` that are as long are taken for the same: those that may differ must.
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
    """In the input alone: weights are constants here."""
    if transposed or any(step != 1 for step in stride):
        raise ExportError(
            "convolutions of a decoder to be refined must have stride 1; enlarge by sub-pixel convolution"
        )
    spread = functional.conv_transpose2d(gradient, weight, None, stride, padding, output_padding, groups, dilation)
    return spread, None, None
