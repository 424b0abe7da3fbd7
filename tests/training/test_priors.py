"""Priors: densities that sum to 1, draws that follow them, and a KL that agrees."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical as Choice
from torch.distributions import Independent, MixtureSameFamily, Normal

from training.distributions.gaussian import DiagonalGaussian
from training.distributions.interface import Prior
from training.distributions.priors.realnvp import RealNvp
from training.distributions.priors.vamp import Vamp

GRID = torch.linspace(-9.0, 9.0, 361)


class Encoder(nn.Module):
    """x (n, 1, 2, 2) -> mean and log_var (n, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_var = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Linear in x."""
        return 3.0 * self.mean(x.flatten(1)), self.log_var(x.flatten(1))


def realnvp(dim: int = 2) -> RealNvp:
    torch.manual_seed(1)
    prior = RealNvp(dim, 4, 16)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    return prior


def vamp() -> Vamp:
    torch.manual_seed(2)
    prior = Vamp(2, (1, 2, 2), Encoder(), 5)
    nn.init.uniform_(prior.pseudo_inputs)
    return prior


PRIORS = {"realnvp": realnvp, "vamp": vamp, "frozen vamp": lambda: vamp().frozen()}


@pytest.fixture(params=PRIORS)
def prior(request: pytest.FixtureRequest) -> Prior:
    """Every learned prior in two dimensions, with weights that make it far from N(0, I)."""
    made: Prior = PRIORS[request.param]()
    return made


@torch.no_grad()
def test_the_density_sums_to_one(prior: Prior) -> None:
    """Over a grid that holds nearly all of it."""
    z = torch.cartesian_prod(GRID, GRID).unflatten(0, (len(GRID), len(GRID)))
    mass = prior.log_prob(z).double().exp().sum() * (GRID[1] - GRID[0]) ** 2
    assert float(mass) == pytest.approx(1.0, abs=2e-3)


@torch.no_grad()
def test_draws_follow_the_density(prior: Prior) -> None:
    """Mean and covariance of 200,000 draws are those of the density on the grid."""
    z = torch.cartesian_prod(GRID, GRID).double()
    weights = prior.log_prob(z.float()).double().exp()
    weights /= weights.sum()
    mean = weights @ z
    covariance = (z - mean).T @ ((z - mean) * weights[:, None])
    draws = prior.draw(torch.randn(200_000, *prior.noise_shape, generator=torch.Generator().manual_seed(3))).double()
    error = 4.0 * (draws.var(0) / len(draws)).sqrt()
    assert bool(((draws.mean(0) - mean).abs() < error).all())
    torch.testing.assert_close(draws.T.cov(), covariance, atol=0.05, rtol=0.03)


@torch.no_grad()
def test_the_kl_at_draws_is_the_integral(prior: Prior) -> None:
    """Averaged over many draws, KL(q || p) by quadrature."""
    posterior = DiagonalGaussian(torch.tensor([[0.4, -0.7]]), torch.tensor([[-0.5, 0.3]]))
    z = torch.cartesian_prod(GRID, GRID)
    log_q = posterior.log_prob(z).double()
    integral = (log_q.exp() * (log_q - prior.log_prob(z).double())).sum() * (GRID[1] - GRID[0]) ** 2
    draws = posterior.draw(torch.randn(100_000, 1, 2, generator=torch.Generator().manual_seed(4)))
    spread = float(prior.log_prob(draws).std()) / math.sqrt(len(draws))
    assert float(prior.kl(posterior, draws)) == pytest.approx(float(integral), abs=4 * spread + 1e-3)


@pytest.mark.parametrize("dim", [2, 3, 7, 40])
@torch.no_grad()
def test_a_flow_is_undone_by_its_inverse(dim: int) -> None:
    """z -> u -> z, for odd and even widths; and log |du/dz| is that of the Jacobian."""
    prior = realnvp(dim).double()
    eps = torch.randn(5, dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    z = prior.draw(eps)

    def towards(point: Tensor) -> Tensor:
        for coupling in prior.couplings:
            point, _ = coupling(point)
        return point

    torch.testing.assert_close(towards(z), eps, atol=1e-4, rtol=1e-4)
    jacobian: Tensor = torch.func.jacrev(towards)(z[0])  # type: ignore[no-untyped-call]
    base = Normal(0.0, 1.0).log_prob(eps[0]).sum()
    expected = base + torch.linalg.slogdet(jacobian.double())[1]
    assert float(prior.log_prob(z[0])) == pytest.approx(float(expected), abs=1e-3)


def test_a_flow_starts_as_the_standard_normal() -> None:
    """Before training nothing is bent, and every dimension is changed by some coupling."""
    prior = RealNvp(5, 2, 8)
    z = torch.randn(4, 5)
    torch.testing.assert_close(prior.log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(-1))
    for coupling in prior.couplings:
        nn.init.normal_(coupling.network[-1].bias)  # type: ignore[index, arg-type]
    assert bool((prior.draw(z) != z).all())


def test_a_flow_needs_two_dimensions() -> None:
    """With one there is nothing to condition on."""
    with pytest.raises(ValueError, match="at least 2"):
        RealNvp(1, 4, 8)


def test_the_vamp_prior_is_a_mixture_of_posteriors() -> None:
    """Of its pseudo-inputs, cut to [0, 1]; the encoder learns through it, and its weights are counted once."""
    prior = vamp()
    with torch.no_grad():
        prior.pseudo_inputs[0] = 7.0
    mean, log_var = prior._encoder[0](prior.pseudo_inputs.clamp(0.0, 1.0))
    mixture = MixtureSameFamily(Choice(torch.ones(5)), Independent(Normal(mean, (0.5 * log_var).exp()), 1))  # type: ignore[no-untyped-call]
    z = torch.randn(6, 2)
    torch.testing.assert_close(prior.log_prob(z), mixture.log_prob(z))
    assert [name for name, _ in prior.named_parameters()] == ["pseudo_inputs"]
    prior.log_prob(z).sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in prior._encoder[0].parameters() if p.grad is not None)
    assert prior.pseudo_inputs.grad is not None


def test_a_frozen_mixture_is_the_same_density() -> None:
    """What is exported needs neither encoder nor pseudo-inputs."""
    prior = vamp()
    z, eps = torch.randn(6, 2), torch.randn(6, 3)
    torch.testing.assert_close(prior.frozen().log_prob(z), prior.log_prob(z))
    torch.testing.assert_close(prior.frozen().draw(eps), prior.draw(eps))
    assert not list(prior.frozen().parameters())
