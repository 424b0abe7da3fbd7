"""Full variational Bayes: right where everything is known, for any decoder, trained and resumed by the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from training.config import Optimisation
from training.data import as_float
from training.distributions.gaussian import LOG_2_PI
from training.distributions.interface import Likelihood
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.standard_normal import StandardNormal
from training.loop.trainer import Stage, train
from training.models.vae import VAE, Bound
from training.networks.conv import Conv
from training.networks.mlp import Mlp
from training.objectives.full_vb import Evidence, FullVb, evidence_bound, full_vb_bound, full_vb_objective, map_bound

SIZE, PIXELS = 40, 6
SHAPE = (1, 2, 3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Pixels(Likelihood):
    """p(x|z) = N(parameters, variance)."""

    variance = 0.5

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """In nats, summed over pixels."""
        square = (x - parameters).square() / self.variance
        return -0.5 * (square + LOG_2_PI + math.log(self.variance)).flatten(-3).sum(-1)


class Recognition(nn.Module):
    """Affine mean, constant variance."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_var = nn.Linear(PIXELS, 2), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 1, 2, 3) -> (n, 2) twice."""
        mean = self.mean(x.flatten(1))
        return mean, self.log_var.expand_as(mean)


class Design(nn.Module):
    """E[x|z] = A theta + W z, A and W known; theta in two parameters."""

    def __init__(self, a: Tensor, w: Tensor) -> None:
        super().__init__()
        self.a, self.w = a, w
        self.first, self.rest = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2, 1))

    def forward(self, z: Tensor) -> Tensor:
        """(n, 2) -> (n, 1, 2, 3)."""
        theta = torch.cat([self.first, self.rest.flatten()])
        return (self.a @ theta + z @ self.w.T).unflatten(1, SHAPE)


class Conjugate:
    """theta ~ N(0, I), z_i ~ N(0, I), x_i = A theta + W z_i + noise: jointly Gaussian in (theta, z_1, ..., z_N).

    Of a Gaussian with precision P the best factorised one has its mean, variances 1 / diag P, and a KL to it of
    (sum log diag P - log det P) / 2 (Bishop, 2006, section 10.1.2). q(z|x) of `Recognition` can be that.
    """

    def __init__(self) -> None:
        generator = seeded(5)
        basis = torch.linalg.qr(torch.randn(PIXELS, PIXELS, generator=generator)).Q
        self.a = basis[:, :3] @ torch.tensor([[1.0, 0.8, 0.0], [0.0, 0.8, 0.5], [0.0, 0.0, 0.9]])
        self.w = 0.6 * basis[:, 2:4]
        grey = 128 + 40 * torch.randn(SIZE, *SHAPE, generator=generator)
        self.images = grey.round().clamp(0, 255).to(torch.uint8)
        self.x = as_float(self.images)
        # x of all images in one row: its mean is `design` (theta, z_1, ..., z_N).
        a, w = self.a.double(), self.w.double()
        design = torch.cat([a.repeat(SIZE, 1), torch.block_diag(*[w] * SIZE)], 1)
        rows = self.x.double().flatten()
        self.precision = torch.eye(design.shape[1], dtype=torch.float64) + design.T @ design / Pixels.variance
        self.mean = torch.linalg.solve(self.precision, design.T @ rows / Pixels.variance)
        covariance = design @ design.T + Pixels.variance * torch.eye(len(rows), dtype=torch.float64)
        self.log_evidence = float(MultivariateNormal(torch.zeros_like(rows), covariance).log_prob(rows))
        gap = self.precision.diagonal().log().sum() - torch.linalg.slogdet(self.precision).logabsdet
        self.best_bound = self.log_evidence - 0.5 * float(gap)

    def module(self) -> FullVb:
        """Untrained."""
        torch.manual_seed(0)
        return FullVb(VAE(Recognition(), Design(self.a, self.w), Pixels(SHAPE), StandardNormal(2)), 0.03)

    def best(self) -> FullVb:
        """With the best factorised q, in closed form."""
        module = self.module()
        mean, variance = self.mean.float(), 1.0 / self.precision.diagonal().float()
        to_z = (torch.eye(2) + self.w.T @ self.w / Pixels.variance).inverse() @ self.w.T / Pixels.variance
        state = {
            "vae.encoder.mean.weight": to_z,
            "vae.encoder.mean.bias": -to_z @ self.a @ mean[:3],
            "vae.encoder.log_var": variance[3:5].log(),
            "vae.decoder.first": mean[:1],
            "vae.decoder.rest": mean[1:3, None],
            "log_var": variance[:3].log(),
        }
        module.load_state_dict(state)
        return module


@pytest.fixture(scope="module")
def conjugate() -> Conjugate:
    return Conjugate()


def stage(module: FullVb, epochs: int) -> Stage:
    settings = Optimisation(epochs=epochs, batch_size=20, learning_rate=0.02, microbatches=4, warmup_steps=0)
    return Stage("full-vb", module, full_vb_objective(SIZE, dynamic=False), settings, 0, {})


def test_the_best_factorised_posterior_has_the_bound_it_must(conjugate: Conjugate) -> None:
    """At the known optimum the estimate is the known bound, which is below the known evidence."""
    found = evidence_bound(conjugate.best(), conjugate.x, 500, seeded(1))
    assert found.standard_error < 0.5
    assert found.bound == pytest.approx(conjugate.best_bound, abs=4.0 * found.standard_error)
    assert conjugate.best_bound < conjugate.log_evidence - 0.5


def test_the_trainer_finds_it(conjugate: Conjugate, tmp_path: Path) -> None:
    """Variances are 1 / diag of the precision within 10 %, means the exact ones, the bound nearly best."""
    module = conjugate.module()
    train(stage(module, 350), conjugate.images, tmp_path)
    found = module.posterior
    variance = 1.0 / conjugate.precision.diagonal()[:3].float()
    torch.testing.assert_close(found.log_var.detach().exp(), variance, rtol=0.1, atol=0.0)
    assert float(((found.mean.detach() - conjugate.mean[:3].float()) / variance.sqrt()).abs().max()) < 0.3
    evidence: Evidence = evidence_bound(module, conjugate.x, 500, seeded(1))
    assert evidence.bound < conjugate.log_evidence
    assert evidence.bound == pytest.approx(conjugate.best_bound, abs=0.5 + 4.0 * evidence.standard_error)


def mlp() -> FullVb:
    """An ordinary VAE with theta as uncertain as not."""
    torch.manual_seed(1)
    network = Mlp(architecture="mlp", hidden=(7,))
    vae = VAE(network.encoder(SHAPE, 2), network.decoder(2, SHAPE), Bernoulli(SHAPE), StandardNormal(2))
    module = FullVb(vae)
    nn.init.normal_(module.log_var, -1.0, 0.5)
    return module


def conv() -> FullVb:
    torch.manual_seed(1)
    network = Conv(architecture="conv", channels=(4, 4), head=4)
    vae = VAE(network.encoder((1, 8, 8), 2), network.decoder(2, (1, 8, 8)), Bernoulli((1, 8, 8)), StandardNormal(2))
    return FullVb(vae, 0.3)


@pytest.mark.parametrize("build", [mlp, conv])
def test_a_draw_moves_every_parameter_as_said(build: Callable[[], FullVb]) -> None:
    """`at` decodes as a decoder does whose parameters, in their order, are mean + std zeta; its own stay."""
    module = build()
    z, zeta = torch.randn(5, 2, generator=seeded(1)), torch.randn(module.log_var.shape, generator=seeded(2))
    at_mean = module.vae.decode(z)
    found = module.at(zeta).decode(z)
    torch.testing.assert_close(module.at(torch.zeros_like(zeta)).decode(z), at_mean)
    torch.testing.assert_close(module.vae.decode(z), at_mean, rtol=0.0, atol=0.0)
    steps = ((0.5 * module.log_var).exp() * zeta).detach()
    moved = nn.utils.parameters_to_vector(module.vae.decoder.parameters()).detach() + steps
    nn.utils.vector_to_parameters(moved, module.vae.decoder.parameters())
    torch.testing.assert_close(found, module.vae.decode(z))
    assert float((found - at_mean).detach().abs().min()) > 0.0


def batch(n: int) -> tuple[Tensor, Tensor]:
    """Binary images, and a draw of the latents' noise for each."""
    return torch.bernoulli(torch.full((n, *SHAPE), 0.5), generator=seeded(3)), torch.randn(1, n, 2, generator=seeded(4))


def test_the_closed_form_kl_is_the_monte_carlo_one() -> None:
    """What the bound takes off for theta, times the number of images, is E[log q(theta) - log p(theta)]."""
    module, (x, eps) = mlp(), batch(1)
    zeta = torch.randn(module.log_var.shape, generator=seeded(5))
    share = (full_vb_bound(module, x, eps, zeta, SIZE).kl - module.vae.bound(x, eps).kl).detach()
    mean, std = module.posterior.mean.detach(), (0.5 * module.log_var).exp().detach()
    theta = mean + std * torch.randn(20_000, len(mean), generator=seeded(6))
    ratio = (Normal(mean, std).log_prob(theta) - Normal(0.0, 1.0).log_prob(theta)).sum(1)
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert float(SIZE * share) == pytest.approx(float(ratio.mean()), abs=4.0 * error + 1e-3)
    assert error < 0.01 * float(ratio.mean())


def test_minibatches_estimate_the_bound_of_all_images() -> None:
    """Over the minibatches of an epoch, N times the mean of the bound is on average that of all N images."""
    module, (x, eps) = mlp(), batch(SIZE)
    zeta = torch.randn(module.log_var.shape, generator=seeded(5))
    parts = zip(x.split(8), eps.split(8, 1), strict=True)
    estimates = [SIZE * full_vb_bound(module, part, noise, zeta, SIZE).elbo.mean() for part, noise in parts]
    all_images = module.at(zeta).bound(x, eps).elbo.sum() - module.posterior.kl_from_standard_normal()
    torch.testing.assert_close(torch.stack(estimates).mean(), all_images)
    assert float(torch.stack(estimates).detach().std()) > 0.1


def test_map_is_the_limit_of_a_certain_posterior() -> None:
    """With no variance the bound's gradient in the means is that of log p(x) + log p(theta) / N."""
    module, (x, eps) = mlp(), batch(8)
    nn.init.constant_(module.log_var, -40.0)
    parameters = list(module.vae.decoder.parameters())
    zeta = torch.ones_like(module.log_var)
    full = torch.autograd.grad(full_vb_bound(module, x, eps, zeta, SIZE).elbo.mean(), parameters)
    point = torch.autograd.grad(map_bound(module.vae, x, eps, SIZE).elbo.mean(), parameters)
    plain = torch.autograd.grad(module.vae.bound(x, eps).elbo.mean(), parameters)
    for mine, theirs, without, parameter in zip(full, point, plain, parameters, strict=True):
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(theirs, without - parameter / SIZE)


def test_an_interrupted_run_is_resumed_bit_for_bit(conjugate: Conjugate, tmp_path: Path) -> None:
    """Means, variances and moments end as those of an unbroken run."""
    train(stage(conjugate.module(), 20), conjugate.images, tmp_path / "unbroken")
    whole = stage(conjugate.module(), 20)
    calls = iter(range(100))

    def breaking(module: Any, images: Tensor, generator: torch.Generator) -> Bound:
        if next(calls) == 17:
            raise KeyboardInterrupt
        return whole.objective(module, images, generator)

    with pytest.raises(KeyboardInterrupt):
        train(Stage("full-vb", whole.module, breaking, whole.optimisation, 0, {}), conjugate.images, tmp_path / "two")
    train(stage(conjugate.module(), 20), conjugate.images, tmp_path / "two")
    one, two = (torch.load(tmp_path / name / "full-vb.pt", weights_only=True) for name in ("unbroken", "two"))
    for part in ("module", "averaged"):
        assert all(torch.equal(value, two[part][key]) for key, value in one[part].items())
    assert float(one["module"]["log_var"].std()) > 0.0
