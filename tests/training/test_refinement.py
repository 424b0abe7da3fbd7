"""The step of refinement: a bound on log p(y) that is one, gradients that are its slopes, a graph for any seen size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from training.distributions.gaussian import DiagonalGaussian
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.standard_normal import StandardNormal
from training.inference.refinement import JUDGED_AT, Refinement, observation_density
from training.models.restoration import Fusion
from training.models.vae import VAE

D, F, SHAPE = 3, 4, (1, 6, 4)


class Exact(VAE):
    """Decodes in double where it is in double."""

    def decode(self, z: Tensor) -> Tensor:
        """(n, d) -> (n, c, h, w)."""
        found: Tensor = self.decoder(z)
        return found


@pytest.fixture
def module() -> Refinement:
    """A decoder of one hidden layer."""
    torch.manual_seed(2)
    decoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, math.prod(SHAPE)), nn.Unflatten(1, SHAPE))
    vae = Exact(nn.Identity(), decoder, Bernoulli(SHAPE), StandardNormal(D))
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.5)
    fusion = Fusion()
    fusion.extreme_logits.data.copy_(torch.tensor([0.8, 0.6]).logit())
    return Refinement(vae, fusion).eval().requires_grad_(False)


def operators(n: int, *, halved: bool = False) -> tuple[Tensor, Tensor]:
    """The identity, or the mean of blocks of two by two."""
    rows, columns = torch.eye(SHAPE[1]), torch.eye(SHAPE[2])
    if halved:
        rows, columns = (eye.reshape(len(eye) // 2, 2, -1).mean(1) for eye in (rows, columns))
    return rows.repeat(n, 1, 1), columns.repeat(n, 1, 1)


def inputs(level: tuple[float, ...], *, n: int = 2, unknown: float = 1.0, halved: bool = False) -> list[Tensor]:
    """Every input of the module, for observations of no meaning."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = operators(n, halved=halved)
    y = torch.rand(n, 1, rows.shape[1], columns.shape[1], generator=generator)
    y[0, 0, 0, 0], y[0, 0, 0, 1] = 0.0, 1.0
    mask = (torch.rand(y.shape, generator=generator) < 0.8).float()
    mean, log_var, eps = torch.randn(3, n, D + F, generator=generator).unbind(0)
    levels, known = torch.tensor([level]).repeat(n, 1), torch.full((n, F), unknown)
    return [0.3 * mean, log_var - 2.0, eps, y * mask, mask, levels, known * (levels > 0.0), rows, columns]


@pytest.mark.parametrize(
    "level",
    [(0.2, 0.0, 0.0, 0.0), (0.0, 0.3, 0.0, 0.0), (0.0, 0.0, 0.4, 0.0), (0.0, 0.0, 0.0, 0.3), (0.0, 0.0, 0.0, 0.0)],
)
@pytest.mark.parametrize("halved", [False, True])
def test_gradients_are_the_slopes_of_the_bound(module: Refinement, level: tuple[float, ...], halved: bool) -> None:
    """Central differences in every parameter of q, for every family of noise and through an operator."""
    given = [part.double() for part in inputs(level, halved=halved)]
    module = module.double()
    gradients = module(*given)[2:]
    for which, gradient in enumerate(gradients):
        for k in range(D + F):
            values = []
            for step in (1e-5, -1e-5):
                moved = [part.clone() for part in given]
                moved[which][:, k] += step
                values.append(bound(module, *moved))
            slope = (values[0] - values[1]) / 2e-5
            torch.testing.assert_close(gradient[:, k], slope, rtol=1e-5, atol=1e-5)


def bound(module: Refinement, *given: Tensor) -> Tensor:
    """In double, which the graph's output is not."""
    return module._elbo(DiagonalGaussian(*given[:2]), *given[2:])[0]


def test_it_is_a_bound_on_log_p_of_what_is_seen() -> None:
    """One latent, so that log p(y) is a sum over a grid: below it at any q, close to it at the best one."""
    torch.manual_seed(1)
    decoder = nn.Sequential(nn.Linear(1, math.prod(SHAPE)), nn.Unflatten(1, SHAPE))
    vae = VAE(nn.Identity(), decoder, Bernoulli(SHAPE), StandardNormal(1))
    module = Refinement(vae, Fusion()).eval().requires_grad_(False)
    level, (rows, columns) = torch.tensor([[0.3, 0.0, 0.0, 0.0]]), operators(1)
    z = torch.tensor([[0.7]])
    y = vae.likelihood.mean(vae.decode(z)) + 0.3 * torch.randn(1, *SHAPE)
    grid = torch.linspace(-6.0, 6.0, 2001)[:, None]
    x_mean = vae.likelihood.mean(vae.decode(grid))
    variance, logit = module.fusion.pixel_prior(x_mean, level.clamp(min=JUDGED_AT).expand(len(grid), -1))
    density = observation_density(x_mean, variance, logit, y, level.expand(len(grid), -1), module.fusion.extremes)
    joint = density.log().flatten(1).sum(1) - 0.5 * grid[:, 0].square() - 0.5 * math.log(2 * math.pi)
    evidence = float(torch.logsumexp(joint, 0)) + math.log(12.0 / 2000)
    mean, log_var = torch.zeros(1, 1 + F), torch.zeros(1, 1 + F)
    given = [y, torch.ones_like(y), level, torch.zeros(1, F), rows, columns]
    reached = []
    for step in range(400):
        eps = torch.randn(64, 1 + F, generator=torch.Generator().manual_seed(step))
        many = [part.expand(64, *part.shape[1:]) for part in given]
        elbo, _, in_mean, in_log_var = module(mean.expand(64, -1), log_var.expand(64, -1), eps, *many)
        mean = mean + 0.03 * in_mean.mean(0).clamp(-1.0, 1.0)
        log_var = log_var + 0.03 * in_log_var.mean(0).clamp(-1.0, 1.0)
        reached.append(float(elbo.mean()))
    assert max(reached[:5]) < evidence
    assert evidence - 0.3 < sum(reached[-50:]) / 50 < evidence + 0.05


def test_the_density_of_an_observation_is_one() -> None:
    """Over [0, 1] widened by the noise it sums to 1, and under salt and pepper the two extremes take their share."""
    x_mean, variance, logit = torch.tensor(0.6), torch.tensor(0.02), torch.tensor(-3.0)
    shaped = [t.reshape(1, 1, 1, 1) for t in (x_mean, variance, logit)]
    y = torch.linspace(-3.0, 4.0, 70_001)

    def of(level: tuple[float, ...], values: Tensor) -> Tensor:
        wide = [t.expand(len(values), 1, 1, 1) for t in shaped]
        found = observation_density(
            *wide, values[:, None, None, None], torch.tensor([level]).expand(len(values), -1), torch.tensor([0.9, 0.7])
        )
        return found[:, 0, 0, 0]

    inside = (y >= 0.0) & (y <= 1.0)
    anything = float(torch.sigmoid(logit))
    total = float(of((0.1, 0.0, 0.0, 0.0), y).sum()) * 1e-4
    assert total == pytest.approx(1.0 + 6.0 * anything, abs=1e-3)  # "anything" has density 1 wherever it is asked
    flipped = of((0.0, 0.2, 0.0, 0.0), torch.tensor([0.0, 1.0]))
    assert flipped.tolist() == pytest.approx([0.8 * 0.9 * 0.4 + 0.1, 0.8 * 0.7 * 0.6 + 0.1])
    masked = of((0.0, 0.0, 0.3, 0.0), torch.tensor([0.0, 1.0]))
    assert masked.tolist() == pytest.approx([0.7 * 0.9 * 0.4 + 0.3, 0.7 * 0.7 * 0.6])
    assert float(of((0.0, 0.2, 0.0, 0.0), y[inside][1:-1]).mean()) == pytest.approx(0.8, abs=0.01)


def test_a_known_level_stays_and_an_unknown_one_moves(module: Refinement) -> None:
    """What is drawn is the level itself, or a positive multiple of it; shares stay shares."""
    _, known, *gradients = module(*inputs((0.2, 0.0, 0.0, 0.0), unknown=0.0))
    assert torch.equal(known, torch.tensor([[0.2, 0.0, 0.0, 0.0]]).repeat(2, 1))
    assert all(float(gradient[:, D:].abs().max()) == 0.0 for gradient in gradients)
    given = inputs((0.2, 0.0, 0.0, 0.0))
    zeta = given[0][:, D] + (0.5 * given[1][:, D]).exp() * given[2][:, D]
    torch.testing.assert_close(module(*given)[1][:, 0], 0.2 * zeta.exp())
    given = inputs((0.0, 0.9, 0.0, 0.0))
    given[0][:, D + 1] = 5.0
    assert bool((module(*given)[1][:, 1] < 1.0).all())
