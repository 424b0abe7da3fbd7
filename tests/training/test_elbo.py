"""The SGVB estimator and the importance-weighted bound against a linear-Gaussian model, where all is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.standard_normal import StandardNormal
from training.models.vae import VAE
from training.networks.mlp import Mlp
from training.objectives.elbo import importance_log_likelihood, importance_weighted, monte_carlo_elbo

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
    found = linear_gaussian.vae().bound(x, sigma_points(20)).elbo
    torch.testing.assert_close(found.double(), linear_gaussian.log_prob(x), atol=2e-4, rtol=0)


@pytest.mark.parametrize(("shift", "scale"), OTHERS)
def test_elbo_is_below_log_p_x_by_the_posterior_s_kl(
    linear_gaussian: LinearGaussian, shift: float, scale: float
) -> None:
    """log p(x) - ELBO = KL(q(z|x) || p(z|x)) for any q."""
    x = linear_gaussian.x(20)
    exact = linear_gaussian.posterior(x)
    gap = kl_divergence(Normal(exact.loc + shift, scale * exact.scale), exact).sum(1)
    bound = linear_gaussian.vae(shift, scale).bound(x, sigma_points(20)).elbo
    torch.testing.assert_close(linear_gaussian.log_prob(x) - bound.double(), gap, atol=5e-4, rtol=1e-4)


def test_bound_is_likelihood_less_kl_one_figure_an_image(linear_gaussian: LinearGaussian) -> None:
    """Terms are (n,), whatever the number of draws; elbo is their difference."""
    bound = linear_gaussian.vae().bound(linear_gaussian.x(5), torch.randn(3, 5, 2))
    assert bound.log_likelihood.shape == bound.kl.shape == (5,)
    assert torch.equal(bound.elbo, bound.log_likelihood - bound.kl)


def test_draws_are_averaged(linear_gaussian: LinearGaussian) -> None:
    """The estimate with L draws is the mean of the L estimates with one."""
    model, x = linear_gaussian.vae(0.3, 1.4), linear_gaussian.x(4)
    eps = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(1))
    singles = torch.stack([model.bound(x, one[None]).elbo for one in eps])
    torch.testing.assert_close(model.bound(x, eps).elbo, singles.mean(0))


class Objective(nn.Module):
    """A bound as a module, so that torch.func can differentiate it with respect to named parameters."""

    def __init__(self, vae: VAE, bound: Callable[[VAE, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.vae, self.bound = vae, bound

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        """The summed bound."""
        return self.bound(self.vae, x, eps).sum()


def gradients(objective: Objective, x: Tensor, eps: Tensor) -> dict[str, Tensor]:
    """One gradient a draw, every parameter's: eps (draws, L, n, d)."""
    parameters = {name: p.detach() for name, p in objective.named_parameters()}

    def value(parameters: dict[str, Tensor], eps: Tensor) -> Tensor:
        return torch.func.functional_call(objective, parameters, (x, eps))

    found: dict[str, Tensor] = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(parameters, eps)
    return {name: gradient.double() for name, gradient in found.items()}


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


ESTIMATORS = {"A": monte_carlo_elbo, "B": VAE.bound}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_sgvb_gradient_is_the_gradient_of_the_bound(linear_gaussian: LinearGaussian, estimator: str) -> None:
    """Over 10^5 draws each estimator's mean gradient is within four standard errors of the exact, every parameter's."""
    draws = 100_000
    objective = Objective(linear_gaussian.vae(0.4, 1.6), lambda *given: ESTIMATORS[estimator](*given).elbo)
    x = linear_gaussian.x(1, seed=5)
    found = gradients(objective, x, torch.randn(draws, 1, 1, 2, generator=torch.Generator().manual_seed(2)))
    q = objective.vae.posterior(x)
    expected = exact_gradient(linear_gaussian, x.flatten().double(), q.mean[0].double(), q.log_var[0].double().exp())
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        standard_error = found[name].std(0) / math.sqrt(draws) + 1e-5
        z = (found[name].mean(0) - exact.detach()) / standard_error
        assert z.abs().max() < 4.0, f"{name}: z = {z}"


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), *OTHERS])
def test_gradients_vary_as_theory_says(linear_gaussian: LinearGaussian, shift: float, scale: float) -> None:
    """The variance of either estimator's gradient by log_var, and so which of the two is the quieter.

    A latent's gradient is g(z) s eps / 2 with g linear in z: under A the slope of log p(x, z), under B of log p(x|z).
    With the posterior N(m, 1/p) and q = N(m + d, s^2): var A = s^2/4 (p^2 d^2 + 2 s^2 p^2),
    var B = s^2/4 ((m - (p - 1) d)^2 + 2 s^2 (p - 1)^2).
    """
    vae, x = linear_gaussian.vae(shift, scale), linear_gaussian.x(1, seed=5)
    exact, q = linear_gaussian.posterior(x), vae.posterior(x)
    m, p = exact.loc[0], exact.scale[0] ** -2
    d, s2 = q.mean[0].detach().double() - m, q.log_var[0].detach().double().exp()
    expected = {
        "A": s2 / 4 * (p**2 * d**2 + 2 * s2 * p**2),
        "B": s2 / 4 * ((m - (p - 1) * d) ** 2 + 2 * s2 * (p - 1) ** 2),
    }
    eps = torch.randn(100_000, 1, 1, 2, generator=torch.Generator().manual_seed(6))
    found = {
        name: gradients(Objective(vae, lambda *given, b=bound: b(*given).elbo), x, eps)["vae.encoder.log_var"].var(0)
        for name, bound in ESTIMATORS.items()
    }
    for name, variance in found.items():
        torch.testing.assert_close(variance, expected[name], rtol=0.05, atol=1e-4)
    assert bool(((found["B"] < found["A"]) == (expected["B"] < expected["A"])).all())
    if shift == 0.0:
        assert bool((found["B"] < found["A"]).all())


def test_estimator_a_s_value_has_the_bound_s_mean(linear_gaussian: LinearGaussian) -> None:
    """A and B estimate the same thing; with the KL known B is the less noisy in value for a q far from the prior."""
    model, x = linear_gaussian.vae(0.4, 1.6), linear_gaussian.x(1)
    eps = torch.randn(1, 50_000, 2, generator=torch.Generator().manual_seed(7))
    rows = x.expand(50_000, -1, -1, -1)
    both = torch.stack([estimate(model, rows, eps).elbo for estimate in (VAE.bound, monte_carlo_elbo)]).double()
    standard_error = float((both[0] - both[1]).std()) / math.sqrt(50_000)
    assert abs(float((both[0] - both[1]).mean())) < 4.0 * standard_error


def test_doubly_reparameterised_gradients_are_unbiased(linear_gaussian: LinearGaussian) -> None:
    """Their mean is that of the plain gradients of the same bound, for both networks; its value is the bound's."""
    model, x, k = linear_gaussian.vae(0.4, 1.6).requires_grad_(), linear_gaussian.x(1, seed=5), 5
    rows, chunks = x.expand(2_000, -1, -1, -1), 30
    generator = torch.Generator().manual_seed(8)
    found: dict[str, list[dict[str, Tensor]]] = {"plain": [], "double": []}
    for _ in range(chunks):
        eps = torch.randn(k, len(rows), 2, generator=generator)
        values = {
            "plain": importance_log_likelihood(model, rows, eps),
            "double": importance_weighted(model, rows, eps).elbo,
        }
        torch.testing.assert_close(values["double"], values["plain"])
        for name, value in values.items():
            model.zero_grad()
            value.mean().backward()
            found[name].append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name in found["plain"][0]:
        difference = torch.stack([a[name] - b[name] for a, b in zip(*found.values(), strict=True)]).double()
        z = difference.mean(0) / (difference.std(0) / math.sqrt(chunks) + 1e-6)
        assert z.abs().max() < 4.5, f"{name}: {z}"


def test_grey_levels_have_no_importance_weighted_likelihood() -> None:
    """Under Bernoulli pixels the evaluator refuses it, and takes black and white."""
    mlp = Mlp(architecture="mlp", hidden=(4,))
    vae = VAE(mlp.encoder((1, 2, 3), 2), mlp.decoder(2, (1, 2, 3)), Bernoulli((1, 2, 3)), StandardNormal(2))
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0]).reshape(1, 1, 2, 3)
    assert bool(importance_log_likelihood(vae, x, torch.zeros(1, 1, 2)).isfinite())
    with pytest.raises(ValueError, match="binarise"):
        importance_log_likelihood(vae, 0.5 * x, torch.zeros(1, 1, 2))


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
    assert means[0] == pytest.approx(float(model.bound(x, sigma_points(1)).elbo), abs=0.1)
    assert means[0] < means[1] < means[2] < exact + 0.01
