"""The diagonal Gaussian against numerical integration and against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from training.distributions.gaussian import DiagonalGaussian
from training.distributions.priors.standard_normal import StandardNormal

CASES = [(0.0, 0.0), (1.3, -0.7), (-2.0, 1.1), (0.4, -4.0)]


@pytest.mark.parametrize(("mean", "log_var"), CASES)
def test_kl_equals_its_integral(mean: float, log_var: float) -> None:
    """The closed form is the integral of q log(q / p)."""
    std = float(torch.tensor(log_var, dtype=torch.float64).mul(0.5).exp())
    z = torch.linspace(mean - 12.0 * std, mean + 12.0 * std, 40_001, dtype=torch.float64)
    q, p = (Normal(*torch.tensor(pair, dtype=torch.float64)) for pair in ((mean, std), (0.0, 1.0)))
    integral = torch.trapezoid(q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z)), z)
    gaussian = DiagonalGaussian(torch.tensor([mean], dtype=torch.float64), torch.tensor([log_var], dtype=torch.float64))
    assert float(gaussian.kl_from_standard_normal()) == pytest.approx(float(integral), abs=1e-9)


def test_kl_equals_that_of_torch_and_sums_over_dimensions() -> None:
    """Summed over the last axis it is torch.distributions' KL, one figure a row."""
    generator = torch.Generator().manual_seed(1)
    mean, log_var = torch.randn(2, 5, 4, 7, generator=generator, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0)).sum(-1)
    found = StandardNormal(mean.shape[1]).kl(DiagonalGaussian(mean, log_var), mean[None])
    assert found.shape == (5, 4)
    torch.testing.assert_close(found, expected)


def test_kl_of_the_prior_from_itself_is_zero() -> None:
    """KL(N(0, I) || N(0, I)) is exactly 0."""
    zero = torch.zeros(3, 8)
    assert DiagonalGaussian(zero, zero).kl_from_standard_normal().tolist() == [0.0, 0.0, 0.0]


def test_log_prob_equals_that_of_torch() -> None:
    """log_prob is the density of torch.distributions' Normal, of the prior too."""
    generator = torch.Generator().manual_seed(2)
    mean, log_var, z = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    expected = Normal(mean, (0.5 * log_var).exp()).log_prob(z).sum(-1)
    torch.testing.assert_close(DiagonalGaussian(mean, log_var).log_prob(z), expected)
    torch.testing.assert_close(StandardNormal(z.shape[1]).log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(-1))


@pytest.mark.parametrize(("mean", "log_var"), CASES)
def test_density_integrates_to_one(mean: float, log_var: float) -> None:
    """The integral of exp(log_prob) over the line is 1."""
    std = float(torch.tensor(0.5 * log_var).exp())
    z = torch.linspace(mean - 12.0 * std, mean + 12.0 * std, 20_001, dtype=torch.float64)
    gaussian = DiagonalGaussian(torch.tensor([mean], dtype=torch.float64), torch.tensor([log_var], dtype=torch.float64))
    assert float(torch.trapezoid(gaussian.log_prob(z[:, None]).exp(), z)) == pytest.approx(1.0, abs=1e-9)


def test_draw_is_mean_plus_std_times_eps() -> None:
    """eps = 0 gives the mean, eps = 1 one standard deviation more; eps may have axes in front."""
    gaussian = DiagonalGaussian(torch.tensor([[1.0, -2.0]]), torch.log(torch.tensor([[4.0, 0.25]])))
    eps = torch.stack([torch.zeros(1, 2), torch.ones(1, 2), -torch.ones(1, 2)])
    expected = torch.tensor([[[1.0, -2.0]], [[3.0, -1.5]], [[-1.0, -2.5]]])
    torch.testing.assert_close(gaussian.draw(eps), expected)


def test_draw_is_differentiable_in_both_parameters() -> None:
    """dz / dmean = 1 and dz / dlog_var = std eps / 2: the reparameterisation trick."""
    mean = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    log_var = torch.log(torch.tensor([4.0, 0.25], dtype=torch.float64)).requires_grad_()
    eps = torch.tensor([1.5, -2.0], dtype=torch.float64)
    DiagonalGaussian(mean, log_var).draw(eps).sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(log_var.grad, torch.tensor([1.5, -0.5], dtype=torch.float64))


def test_draws_have_the_mean_and_variance_they_are_asked_for() -> None:
    """Over many draws, sample mean and variance are within four standard errors."""
    n = 200_000
    eps = torch.randn(n, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mean, variance = torch.tensor([[1.0, -2.0], [4.0, 0.25]], dtype=torch.float64)
    z = DiagonalGaussian(mean, variance.log()).draw(eps)
    assert ((z.mean(0) - mean).abs() < 4.0 * (variance / n).sqrt()).all()
    assert ((z.var(0) - variance).abs() < 4.0 * variance * (2.0 / n) ** 0.5).all()
