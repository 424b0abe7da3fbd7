"""Monte Carlo EM on a linear-Gaussian model, whose posterior and whose best log p(x) are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from tests.training.conftest import LinearGaussian
from training.inference import hmc
from training.inference.mcem import MonteCarloEm, generative_parameters
from training.models.vae import VAE


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_likelihood(vae: VAE, known: LinearGaussian, x: Tensor) -> float:
    """The exact mean log p(x) in nats under the decoder's present weights."""
    weight, bias = (p.detach().double() for p in (vae.decoder.weight, vae.decoder.bias))  # type: ignore[union-attr,operator]
    covariance = weight @ weight.T + known.variance * torch.eye(6, dtype=torch.float64)
    return float(MultivariateNormal(bias, covariance).log_prob(x.flatten(1).double()).mean())


def greatest_log_likelihood(known: LinearGaussian, x: Tensor) -> float:
    """The most that any W and b reach with this noise: the sample's leading eigenvectors (Tipping and Bishop 1999)."""
    flat, dim = x.flatten(1).double(), known.weight.shape[1]
    values, vectors = torch.linalg.eigh((flat - flat.mean(0)).T @ (flat - flat.mean(0)) / len(flat))
    weight = vectors[:, -dim:] * (values[-dim:] - known.variance).clamp(min=0.0).sqrt()
    covariance = weight @ weight.T + known.variance * torch.eye(6, dtype=torch.float64)
    return float(MultivariateNormal(flat.mean(0), covariance).log_prob(flat).mean())


def perturbed(known: LinearGaussian) -> VAE:
    """Decoder weights moved by standard normal noise; no more trained than they."""
    vae = known.vae()
    vae.decoder.requires_grad_()
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator(1)))
    return vae


@pytest.mark.parametrize("latent_dim", [2, 3])
def test_it_raises_log_p_x_to_the_maximum(latent_dim: int) -> None:
    """From nats below it to within 0.05 of what no linear model exceeds, the chains persisting."""
    known = LinearGaussian(latent_dim)
    x, vae = known.x(500), perturbed(known)
    best, before = greatest_log_likelihood(known, x), log_likelihood(vae, known, x)
    em = MonteCarloEm(vae, generator(2), learning_rate=0.2)
    chains, order = em.start(500), generator(3)
    for _ in range(150):
        rows = torch.randint(500, (100,), generator=order)
        chains[rows] = em.step(x[rows], chains[rows]).z
    after = log_likelihood(vae, known, x)
    assert before < best - 2.0
    assert best - 0.05 < after <= best


def test_chains_may_begin_anew(linear_gaussian: LinearGaussian) -> None:
    """With 20 transitions a minibatch's chains, drawn from N(0, I) every time, do as well to 0.2 nats."""
    x, vae = linear_gaussian.x(100), perturbed(linear_gaussian)
    em = MonteCarloEm(vae, generator(2), learning_rate=0.3, transitions=20)
    for _ in range(50):
        em.step(x, em.start(100))
    assert log_likelihood(vae, linear_gaussian, x) > greatest_log_likelihood(linear_gaussian, x) - 0.2


def test_chains_have_the_exact_posterior_s_moments() -> None:
    """The E step alone, weights held: means of 4,000 chains an image, and variances, within 4.5 standard errors."""
    known, each = LinearGaussian(3), 4_000
    x = known.x(4)
    em = MonteCarloEm(perturbed(known), generator(4), weight_updates=0)
    em.model = known.vae()
    z = em.start(4 * each)
    for _ in range(30):
        z = em.step(x.repeat_interleave(each, 0), z).z
    exact, found = known.posterior(x), z.double().unflatten(0, (4, each))
    assert ((found.mean(1) - exact.mean).abs() < 4.5 * exact.stddev / math.sqrt(each)).all()
    assert ((found.var(1) / exact.variance - 1.0).abs() < 4.5 * math.sqrt(2.0 / each)).all()


def test_acceptance_comes_to_nine_in_ten(linear_gaussian: LinearGaussian) -> None:
    """From a step ten times too short, and while the weights move."""
    x = linear_gaussian.x(200)
    em = MonteCarloEm(perturbed(linear_gaussian), generator(5), step_size=0.01)
    z, acceptance = em.start(200), []
    for _ in range(100):
        step = em.step(x, z)
        z = step.z
        acceptance.append(step.acceptance)
    assert sum(acceptance[-40:]) / 40 == pytest.approx(hmc.ACCEPTANCE, abs=0.02)
    assert step.step_size > 0.05


def test_a_step_is_one_trajectory_and_five_updates_of_the_generative_model(linear_gaussian: LinearGaussian) -> None:
    """The decoder is run ten times and once to draw, five times to learn; the encoder never, and it stays as it is."""
    vae = perturbed(linear_gaussian).requires_grad_()
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    runs = {"encoder": 0, "decoder": 0}
    for name in ("encoder", "decoder"):
        getattr(vae, name).register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    em = MonteCarloEm(vae, generator(6))
    x, z = linear_gaussian.x(10), em.start(10)
    step = em.step(x, z)
    assert runs == {"encoder": 0, "decoder": 11 + 5}
    assert step.z.shape == (10, 2)
    assert step.log_joint.shape == (10,)
    moved = {name for name, p in vae.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"decoder.weight", "decoder.bias"}
    assert len(generative_parameters(vae)) == 2


def test_log_joint_is_the_chains_before_the_weights_moved(linear_gaussian: LinearGaussian) -> None:
    """log p(x, z) = log p(x) + log p(z|x), both known, with no weight updates."""
    x = linear_gaussian.x(20)
    vae = linear_gaussian.vae()
    vae.decoder.requires_grad_()
    em = MonteCarloEm(vae, generator(7), weight_updates=0)
    step = em.step(x, em.start(20))
    expected = linear_gaussian.log_prob(x) + linear_gaussian.posterior(x).log_prob(step.z.double()).sum(1)
    torch.testing.assert_close(step.log_joint.double(), expected, atol=1e-3, rtol=0)


def test_the_prior_is_on_weights_alone(linear_gaussian: LinearGaussian) -> None:
    """One update under a strong prior: every weight goes towards 0, and the bias where it goes without a prior."""
    x, moved = linear_gaussian.x(50), []
    before = perturbed(linear_gaussian).decoder
    for weight_decay in (0.0, 1e6):
        vae = perturbed(linear_gaussian)
        em = MonteCarloEm(vae, generator(8), learning_rate=1e-3, weight_decay=weight_decay, weight_updates=1)
        em.step(x, em.start(50))
        moved.append(vae.decoder)
    assert torch.equal(moved[0].bias, moved[1].bias)  # type: ignore[arg-type]
    assert not torch.equal(moved[0].bias, before.bias)  # type: ignore[arg-type]
    assert (moved[1].weight.abs() < before.weight.abs()).all()  # type: ignore[operator,union-attr]
