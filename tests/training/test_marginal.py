"""Three ways to log p(x): exact, importance sampling and the estimator of the source's appendix D."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from tests.training.conftest import LinearGaussian
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.standard_normal import StandardNormal
from training.inference.marginal import fit_gaussian, fit_kernel_density, reciprocal_log_likelihood, reciprocal_mean
from training.models.vae import VAE
from training.networks.mlp import Mlp
from training.objectives.elbo import importance_log_likelihood

FITS = {"gaussian": fit_gaussian, "kernel density": fit_kernel_density}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("latent_dim", "draws"), [(1, 1000), (2, 1000), (3, 3000)])
def test_three_estimates_agree(latent_dim: int, draws: int) -> None:
    """Within 0.05 nats on every one of 20 images, the recognition model not exact, the chains begun at the prior."""
    known = LinearGaussian(latent_dim)
    x, vae = known.x(20), known.vae(shift=0.1, scale=1.3)
    exact = known.log_prob(x)
    eps = torch.randn(20_000, 20, latent_dim, generator=generator(1))
    sampled = importance_log_likelihood(vae, x, eps).double()
    start = torch.randn(20, latent_dim, generator=generator(2))
    found = reciprocal_log_likelihood(vae, x, start, generator(3), draws=draws, fit=fit_gaussian)
    for one, other in ((found, exact), (sampled, exact), (found, sampled)):
        assert float((one - other).abs().max()) < 0.05


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_kernel_densities_agree_on_average(latent_dim: int) -> None:
    """Noisier on an image, within 0.05 nats on the mean of 40, which is what the source reports."""
    known = LinearGaussian(latent_dim)
    x = known.x(40)
    start = torch.randn(40, latent_dim, generator=generator(2))
    found = reciprocal_log_likelihood(known.vae(), x, start, generator(3), draws=600)
    assert abs(float((found - known.log_prob(x)).mean())) < 0.05


def test_few_draws_err_upwards() -> None:
    """With the source's 50 draws the mean over 400 images is within 0.3 nats, and above the truth."""
    known = LinearGaussian(3)
    x = known.x(400)
    found = reciprocal_log_likelihood(known.vae(), x, torch.zeros(400, 3), generator(4))
    error = float((found - known.log_prob(x)).mean())
    assert 0.0 < error < 0.3


def mixture(z: Tensor) -> Tensor:
    """Two correlated Gaussians far apart, with constant exp(-7): log density in nats."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    halves = [MultivariateNormal(torch.tensor([x, 0.0]), covariance).log_prob(z) for x in (-4.0, 4.0)]
    return torch.logsumexp(torch.stack(halves), 0) - math.log(2.0) - 7.0


def test_kernels_fit_what_a_gaussian_does_not() -> None:
    """The constant of a mixture of two modes from exact draws; a Gaussian has its mass where there are no draws."""
    images, size = 30, 600
    noise = (
        torch.randn(2 * size, images, 2, generator=generator(5))
        @ torch.linalg.cholesky(torch.tensor([[1.0, 0.8], [0.8, 1.0]])).mT
    )
    side = torch.randint(2, (2 * size, images), generator=generator(6)) * 8.0 - 4.0
    z = noise + torch.stack([side, torch.zeros_like(side)], -1)
    error = {
        name: reciprocal_mean(fit(z[:size]), z[size:], mixture(z[size:])) + 7.0  # type: ignore[operator]
        for name, fit in FITS.items()
    }
    assert float(error["kernel density"].mean().abs()) < 0.02
    assert float(error["kernel density"].abs().max()) < 0.15
    assert float(error["gaussian"].mean().abs()) > 0.2, error


@pytest.mark.parametrize("fit", FITS)
def test_fitted_densities_sum_to_one(fit: str) -> None:
    """For each image, on a grid that holds nearly all of it."""
    draws = torch.randn(80, 2, 2, generator=generator(7)) * torch.tensor([0.5, 1.5]) + torch.tensor([1.0, -1.0])
    axis = torch.linspace(-8.0, 8.0, 321)
    grid = torch.cartesian_prod(axis, axis)[:, None].expand(-1, 2, -1)
    mass = FITS[fit](draws).log_prob(grid).exp().sum(0) * float(axis[1] - axis[0]) ** 2  # type: ignore[operator]
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=2e-3, rtol=0)


def test_a_density_is_each_image_s_own() -> None:
    """Fitting images together or alone gives the same."""
    draws = torch.randn(40, 3, 2, generator=generator(8)) * torch.tensor([[[1.0], [3.0], [0.1]]])
    for fit in FITS.values():
        alone = torch.cat([fit(draws[:, i : i + 1]).log_prob(draws[:5, i : i + 1]) for i in range(3)], 1)
        torch.testing.assert_close(fit(draws).log_prob(draws[:5]), alone)


def test_a_chain_that_never_moved_spoils_no_other() -> None:
    """Its figure is finite, and the others' are as they were."""
    draws = torch.randn(40, 2, 2, generator=generator(9))
    stuck = torch.cat([draws[:, :1], torch.ones(40, 1, 2)], 1)
    for fit in FITS.values():
        found = fit(stuck).log_prob(stuck)
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found[:, 0], fit(draws).log_prob(draws)[:, 0])


def test_what_has_no_probability_and_what_is_too_little_are_refused() -> None:
    """Grey levels under Bernoulli pixels; as many draws as would not fix a covariance."""
    mlp = Mlp(architecture="mlp", hidden=(4,))
    vae = VAE(mlp.encoder((1, 2, 3), 2), mlp.decoder(2, (1, 2, 3)), Bernoulli((1, 2, 3)), StandardNormal(2))
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0]).reshape(1, 1, 2, 3)
    start = torch.zeros(1, 2)
    assert bool(reciprocal_log_likelihood(vae, x, start, generator()).isfinite())
    with pytest.raises(ValueError, match="binarise"):
        reciprocal_log_likelihood(vae, 0.5 * x, start, generator())
    with pytest.raises(ValueError, match="too few"):
        reciprocal_log_likelihood(vae, x, start, generator(), draws=5)
