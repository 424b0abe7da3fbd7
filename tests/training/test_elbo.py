"""The SGVB estimator and the importance-weighted bound against a linear-Gaussian model, where all is known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from training.elbo import elbo, importance_log_likelihood
from training.model import VAE

if TYPE_CHECKING:
    from tests.training.conftest import LinearGaussian

OTHERS = [(0.0, 2.0), (0.4, 1.0), (-0.3, 0.5), (1.0, 1.5)]


def sigma_points(n: int, d: int = 2) -> Tensor:
    """2 d draws with mean 0 and covariance I exactly: over a quadratic in eps their mean is the expectation."""
    points = math.sqrt(d) * torch.cat([torch.eye(d), -torch.eye(d)])
    return points[:, None, :].expand(-1, n, -1)


def test_elbo_of_the_exact_posterior_is_log_p_x(linear_gaussian: LinearGaussian) -> None:
    """With q(z|x) = p(z|x) the bound is tight."""
    x = linear_gaussian.x(20)
    found = elbo(linear_gaussian.vae(), x, sigma_points(20)).elbo
    torch.testing.assert_close(found.double(), linear_gaussian.log_prob(x), atol=2e-4, rtol=0)


@pytest.mark.parametrize(("shift", "scale"), OTHERS)
def test_elbo_is_below_log_p_x_by_the_posterior_s_kl(
    linear_gaussian: LinearGaussian, shift: float, scale: float
) -> None:
    """log p(x) - ELBO = KL(q(z|x) || p(z|x)) for any q."""
    x = linear_gaussian.x(20)
    exact = linear_gaussian.posterior(x)
    gap = kl_divergence(Normal(exact.loc + shift, scale * exact.scale), exact).sum(1)
    bound = elbo(linear_gaussian.vae(shift, scale), x, sigma_points(20)).elbo
    torch.testing.assert_close(linear_gaussian.log_prob(x) - bound.double(), gap, atol=5e-4, rtol=1e-4)


def test_bound_is_likelihood_less_kl_one_figure_an_image(linear_gaussian: LinearGaussian) -> None:
    """Terms are (n,), whatever the number of draws; elbo is their difference."""
    bound = elbo(linear_gaussian.vae(), linear_gaussian.x(5), torch.randn(3, 5, 2))
    assert bound.log_likelihood.shape == bound.kl.shape == (5,)
    assert torch.equal(bound.elbo, bound.log_likelihood - bound.kl)


def test_draws_are_averaged(linear_gaussian: LinearGaussian) -> None:
    """The estimate with L draws is the mean of the L estimates with one."""
    model, x = linear_gaussian.vae(0.3, 1.4), linear_gaussian.x(4)
    eps = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(1))
    singles = torch.stack([elbo(model, x, one[None]).elbo for one in eps])
    torch.testing.assert_close(elbo(model, x, eps).elbo, singles.mean(0))


class Objective(nn.Module):
    """elbo as a module, so that torch.func can differentiate it with respect to named parameters."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        """The summed bound."""
        return elbo(self.vae, x, eps).elbo.sum()


def exact_gradient(model: LinearGaussian, x: Tensor, mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
    """Gradient of E_q[log p(x|z)] - KL(q || p) by hand, for one x and q = N(mean, diag(variance))."""
    residual = x - model.weight @ mean - model.bias
    by_mean = model.weight.T @ residual / model.variance - mean
    columns = model.weight.square().sum(0)
    return {
        "vae.encoder.weight": torch.outer(by_mean, x),
        "vae.encoder.bias": by_mean,
        "vae.encoder.log_var": -0.5 * variance * columns / model.variance - 0.5 * (variance - 1.0),
        "vae.decoder.weight": (torch.outer(residual, mean) - model.weight * variance) / model.variance,
        "vae.decoder.bias": residual / model.variance,
    }


def test_expected_sgvb_gradient_is_the_gradient_of_the_bound(linear_gaussian: LinearGaussian) -> None:
    """Over many draws the estimator's mean gradient, every parameter's, is within four standard errors of the exact."""
    draws = 40_000
    objective, x = Objective(linear_gaussian.vae(0.4, 1.6)), linear_gaussian.x(1, seed=5)
    parameters = {name: p.detach() for name, p in objective.named_parameters()}
    eps = torch.randn(draws, 1, 1, 2, generator=torch.Generator().manual_seed(2))

    def value(parameters: dict[str, Tensor], eps: Tensor) -> Tensor:
        return torch.func.functional_call(objective, parameters, (x, eps))

    gradients = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(parameters, eps)
    q = objective.vae.posterior(x)
    expected = exact_gradient(linear_gaussian, x.flatten().double(), q.mean[0].double(), q.log_var[0].double().exp())
    assert gradients.keys() == expected.keys()
    for name, exact in expected.items():
        found = gradients[name].double()
        standard_error = found.std(0) / math.sqrt(draws) + 1e-5
        z = (found.mean(0) - exact.detach()) / standard_error
        assert z.abs().max() < 4.0, f"{name}: z = {z}"


@pytest.mark.parametrize("draws", [1, 2, 50])
def test_importance_weights_of_the_exact_posterior_are_constant(linear_gaussian: LinearGaussian, draws: int) -> None:
    """With q(z|x) = p(z|x) any number of samples, whatever they are, gives log p(x) exactly."""
    x = linear_gaussian.x(10)
    eps = torch.randn(draws, 10, 2, generator=torch.Generator().manual_seed(draws))
    found = importance_log_likelihood(linear_gaussian.vae(), x, eps)
    torch.testing.assert_close(found.double(), linear_gaussian.log_prob(x), atol=5e-4, rtol=0)


def test_importance_log_likelihood_approaches_log_p_x(linear_gaussian: LinearGaussian) -> None:
    """With q twice the posterior's variance it is within four standard errors, which are known in closed form.

    E_q[(p / q)^2] = s^2 / sqrt(2 s^2 - 1) a dimension for q of s times the standard deviation.
    """
    draws, scale, x = 20_000, 1.5, linear_gaussian.x(10)
    eps = torch.randn(draws, 10, 2, generator=torch.Generator().manual_seed(3))
    found = importance_log_likelihood(linear_gaussian.vae(scale=scale), x, eps)
    second_moment = (scale**2 / math.sqrt(2.0 * scale**2 - 1.0)) ** 2
    standard_error = math.sqrt((second_moment - 1.0) / draws)
    assert ((found.double() - linear_gaussian.log_prob(x)).abs() < 4.0 * standard_error + 5e-4).all()


def test_importance_bound_grows_with_the_samples(linear_gaussian: LinearGaussian) -> None:
    """E[L_1] = ELBO <= E[L_5] <= E[L_50] <= log p(x) (Burda et al. 2015, theorem 1)."""
    repeats, model, x = 4_000, linear_gaussian.vae(0.3, 1.5), linear_gaussian.x(1)
    rows = x.expand(repeats, -1, -1, -1)
    generator = torch.Generator().manual_seed(4)
    means = [
        float(importance_log_likelihood(model, rows, torch.randn(k, repeats, 2, generator=generator)).mean())
        for k in (1, 5, 50)
    ]
    exact = float(linear_gaussian.log_prob(x))
    assert means[0] == pytest.approx(float(elbo(model, x, sigma_points(1)).elbo), abs=0.1)
    assert means[0] < means[1] < means[2] < exact + 0.01
