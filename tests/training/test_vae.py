"""The model's own figures against a model of which all is known, and shapes of any latent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from training.data import Digits, as_float
from training.distributions.gaussian import of_rows
from training.distributions.interface import Likelihood, Prior, Support
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.likelihoods.discretised_logistic import DiscretisedLogistic
from training.distributions.likelihoods.gaussian import Gaussian
from training.distributions.priors.realnvp import RealNvp
from training.distributions.priors.standard_normal import StandardNormal
from training.distributions.priors.vamp import Vamp
from training.evaluation.scoring import bound_at_draws
from training.models.vae import VAE
from training.networks.mlp import Mlp
from training.objectives.elbo import importance_log_likelihood, importance_weighted, monte_carlo_elbo

if TYPE_CHECKING:
    from pathlib import Path

    from tests.training.conftest import LinearGaussian

SHAPE = (1, 2, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_log_joint_is_the_sum_of_its_parts(linear_gaussian: LinearGaussian) -> None:
    """Log p(x, z) = log p(x) + log p(z|x), for draws of any number of leading axes."""
    x = linear_gaussian.x(5)
    z = torch.randn(3, 5, 2, generator=generator())
    expected = linear_gaussian.log_prob(x) + linear_gaussian.posterior(x).log_prob(z.double()).sum(-1)
    torch.testing.assert_close(linear_gaussian.vae().log_joint(x, z).double(), expected, atol=1e-3, rtol=0)


def test_a_reconstruction_is_at_the_posterior_s_mean(linear_gaussian: LinearGaussian) -> None:
    """E[x|z] = W z + b there."""
    x = linear_gaussian.x(5)
    z = linear_gaussian.posterior(x).loc
    expected = (z @ linear_gaussian.weight.T + linear_gaussian.bias).unflatten(1, SHAPE)
    torch.testing.assert_close(linear_gaussian.vae().reconstruct(x).double(), expected, atol=1e-5, rtol=0)


def test_a_bound_under_another_posterior_is_that_posterior_s(linear_gaussian: LinearGaussian) -> None:
    """Passing another model's posterior gives that model's bound: only the encoders differ."""
    x, other = linear_gaussian.x(5), linear_gaussian.vae(0.4, 1.5)
    eps = other.noise(3, 5, generator())
    found = linear_gaussian.vae().bound(x, eps, other.posterior(x))
    torch.testing.assert_close(found.elbo, other.bound(x, eps).elbo)
    assert not torch.allclose(found.elbo, linear_gaussian.vae().bound(x, eps).elbo)


def test_noise_is_what_randn_draws() -> None:
    """The same numbers as torch's own for the shape, from the same seed."""
    mlp = Mlp(architecture="mlp", hidden=(4,))
    vae = VAE(mlp.encoder(SHAPE, 3), mlp.decoder(3, SHAPE), Bernoulli(SHAPE), StandardNormal(3))
    assert torch.equal(vae.noise(2, 5, generator(1)), torch.randn(2, 5, 3, generator=generator(1)))


@pytest.mark.parametrize(("name", "noise"), [("standard_normal", 3), ("realnvp", 3), ("vamp", 4)])
def test_samples_take_the_prior_s_noise(name: str, noise: int) -> None:
    """Every prior states the shape of its noise; a sample is E[x|z] of the prior's draw."""
    torch.manual_seed(0)
    mlp = Mlp(architecture="mlp", hidden=(4,))
    encoder = mlp.encoder(SHAPE, 3)
    priors: dict[str, Prior] = {
        "standard_normal": StandardNormal(3),
        "realnvp": RealNvp(3, 2, 4),
        "vamp": Vamp(3, SHAPE, encoder, 5),
    }
    vae = VAE(encoder, mlp.decoder(3, SHAPE), Bernoulli(SHAPE), priors[name])
    assert vae.latent_shape == vae.noise_shapes.posterior == (3,)
    assert vae.noise_shapes.prior == (noise,)
    eps = torch.randn(6, noise, generator=generator())
    torch.testing.assert_close(vae.sample(eps), torch.sigmoid(vae.decode(vae.prior.draw(eps))))


class Spatial(Prior):
    """N(0, I) over feature maps of 2 x 3 x 3."""

    def __init__(self) -> None:
        super().__init__((2, 3, 3))

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., 2, 3, 3) -> (...)."""
        return torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(-3).sum(-1)  # type: ignore[no-untyped-call]


def test_latents_may_be_feature_maps() -> None:
    """With a prior of that shape: noise, decoder and log joint take z of any leading axes."""
    torch.manual_seed(0)
    vae = VAE(nn.Identity(), nn.ConvTranspose2d(2, 1, 2, stride=2), Bernoulli((1, 6, 6)), Spatial())
    z = vae.noise(4, 5, generator())
    assert z.shape == (4, 5, 2, 3, 3)
    assert vae.decode(z).shape == (4, 5, 1, 6, 6)
    x = torch.ones(5, 1, 6, 6)
    torch.testing.assert_close(vae.log_joint(x, z)[1, 2], vae.log_joint(x[2:3], z[1, 2:3])[0])


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": Bernoulli(SHAPE),
    "discretised_logistic": DiscretisedLogistic(SHAPE),
    "gaussian": Gaussian(SHAPE, 1 / 256),
}
PIXELS = {Support.BINARY: 1.0, Support.EIGHT_BIT: 37 / 255, Support.REAL: 0.1234}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_likelihood_accepts_its_support(name: str) -> None:
    """Its own values and those of every smaller set; others are refused with what to do."""
    likelihood = LIKELIHOODS[name]
    for support, value in PIXELS.items():
        x = torch.full((2, *SHAPE), value)
        if support <= likelihood.support:
            likelihood.check(x)
        else:
            with pytest.raises(ValueError, match=r"first|round"):
                likelihood.check(x)
    assert likelihood.event_shape == SHAPE


def test_draws_lie_in_the_support() -> None:
    """Of every likelihood."""
    parameters = torch.randn(50, *SHAPE, generator=generator())
    for likelihood in LIKELIHOODS.values():
        with torch.no_grad():
            likelihood.check(likelihood.draw(parameters, generator(1)))


def test_images_lie_in_the_support_of_their_data_set(tmp_path: Path) -> None:
    """Digits hold whole 255ths, and are not binary."""
    digits = Digits(dataset="digits")
    x = as_float(digits.load(tmp_path).test)
    assert digits.support.contains(x)
    assert not Support.BINARY.contains(x)


class Reshaped(nn.Module):
    """A network whose latents, or other tensors of one axis, have three: in front of it or after it."""

    def __init__(self, network: nn.Module, *, decoder: bool) -> None:
        super().__init__()
        self.network, self.decoder = network, decoder

    def forward(self, x: Tensor) -> Any:
        """x (n, c, h, w) -> mean, log_var (n, d, 1, 1), or z (n, d, 1, 1) -> (n, c, h, w)."""
        return self.network(x.flatten(1)) if self.decoder else [part[..., None, None] for part in self.network(x)]


def test_spatial_latents_are_vectors_of_other_axes(linear_gaussian: LinearGaussian) -> None:
    """Every bound on log p(x) is the same, and the importance-weighted one is the exact log p(x)."""
    flat, x = linear_gaussian.vae(), linear_gaussian.x(5)
    encoder, decoder = Reshaped(flat.encoder, decoder=False), Reshaped(flat.decoder, decoder=True)
    spatial = VAE(encoder, decoder, flat.likelihood, StandardNormal(2, 1, 1))
    eps = flat.noise(7, 5, generator())
    assert spatial.noise(7, 5, generator()).shape == (7, 5, 2, 1, 1)
    for bound in (VAE.bound, monte_carlo_elbo, importance_weighted, importance_log_likelihood, bound_at_draws):
        expected, found = bound(flat, x, eps), bound(spatial, x, eps[..., None, None])
        torch.testing.assert_close(torch.stack([*found]), torch.stack([*expected]))
    found = importance_log_likelihood(spatial, x, eps[..., None, None])
    torch.testing.assert_close(found.double(), linear_gaussian.log_prob(x), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(spatial.sample(eps[0, ..., None, None]), flat.sample(eps[0]))


def test_spatial_gaussian_sums_over_its_axes() -> None:
    """KL, entropy and density of a (2, 3, 4) are those of its 24 numbers."""
    mean, log_var, z = torch.randn(3, 5, 2, 3, 4, generator=generator())
    spatial, flat = of_rows(mean, log_var), of_rows(mean.flatten(1), log_var.flatten(1))
    torch.testing.assert_close(spatial.kl_from_standard_normal(), flat.kl_from_standard_normal())
    torch.testing.assert_close(spatial.detach().entropy(), flat.entropy())
    torch.testing.assert_close(spatial.log_prob(z), flat.log_prob(z.flatten(1)))
