"""Hybrid Monte Carlo against densities whose moments are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.inference import hmc

COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.5]])
MEAN = torch.tensor([2.0, -1.0])


def correlated(z: Tensor) -> Tensor:
    """N(MEAN, COVARIANCE) but for its constant."""
    centred = z - MEAN
    return -0.5 * (centred @ COVARIANCE.inverse() * centred).sum(-1)


def gamma(z: Tensor) -> Tensor:
    """The logarithm of a Gamma(3, 1) variable: mean digamma(3), variance trigamma(3), skewed."""
    return (3.0 * z - z.exp()).sum(-1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_moments(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Those of independent draws (n, d), each within four and a half standard errors."""
    draws = draws.double()
    assert ((draws.mean(0) - mean).abs() < 4.5 * draws.std(0) / math.sqrt(len(draws))).all()
    centred = draws - mean
    products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    assert ((products.mean(0) - covariance).abs() < 4.5 * products.std(0) / math.sqrt(len(draws))).all()


@pytest.mark.parametrize("leapfrog_steps", [1, 4, 10])
def test_draws_have_the_density_s_moments(leapfrog_steps: int) -> None:
    """Of 20,000 independent chains that began far away, under a correlated Gaussian."""
    state, chains = hmc.state_at(correlated, torch.zeros(20_000, 2)), generator(1)
    for _ in range(150 // leapfrog_steps + 20):
        state, _ = hmc.transition(correlated, state, torch.tensor(0.45), leapfrog_steps, chains)
    assert_moments(state.z, MEAN.double(), COVARIANCE.double())


def test_draws_of_a_skewed_density_have_its_moments() -> None:
    """log Gamma(3, 1), which a step without its Metropolis test would miss: the step sizes are long."""
    state = hmc.state_at(gamma, torch.ones(20_000, 1))
    chains = generator(2)
    for _ in range(40):
        state, acceptance = hmc.transition(gamma, state, torch.tensor(0.75), 3, chains)
    assert 0.5 < float(acceptance.mean()) < 0.95
    mean, variance = (torch.special.polygamma(i, torch.tensor(3.0).double()) for i in (0, 1))
    assert_moments(state.z, mean.reshape(1), variance.reshape(1, 1))


def test_leapfrog_is_reversible_and_keeps_the_energy() -> None:
    """Run back with the velocity turned it ends where it began; halving the step divides the error by about four."""
    start, velocity = hmc.state_at(gamma, torch.linspace(-1, 2, 7)[:, None].double()), torch.ones(7, 1).double()
    errors = []
    for steps in (10, 20):
        size = torch.full((7, 1), 1.0 / steps).double()
        end, final = hmc.leapfrog(gamma, start, velocity, size, steps)
        back, turned = hmc.leapfrog(gamma, end, -final, size, steps)
        torch.testing.assert_close(back.z, start.z)
        torch.testing.assert_close(turned, -velocity)
        energy = [state.log_density - 0.5 * v.square().sum(-1) for state, v in ((start, velocity), (end, final))]
        errors.append(float((energy[1] - energy[0]).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.25)


@pytest.mark.parametrize("begin", [0.001, 0.1, 20.0])
def test_each_chain_s_step_size_comes_to_nine_in_ten(begin: float) -> None:
    """From steps far too short and far too long, for densities a hundred times as wide as one another."""
    widths = torch.logspace(-1, 1, 50)

    def density(z: Tensor) -> Tensor:
        return -0.5 * (z / widths[:, None]).square().sum(-1)

    draws = hmc.sample(density, torch.zeros(50, 3), 200, generator(3), step_size=begin, burn_in=300)
    assert float(draws.acceptance.mean()) == pytest.approx(0.9, abs=0.02)
    assert float((draws.acceptance - 0.9).abs().max()) < 0.08
    relative = draws.step_size / widths
    assert float(relative.max() / relative.min()) < 1.7


def test_a_common_step_size_follows_the_mean() -> None:
    """A step size without an axis stays one for all the chains."""
    found = hmc.tuned(torch.tensor(0.5), torch.tensor([1.0, 0.4]), 1.0)
    assert found.shape == ()
    assert float(found) == pytest.approx(0.5 * math.exp(-0.2))


@pytest.mark.parametrize("outside", [math.nan, -math.inf, math.inf])
def test_proposals_without_a_finite_density_are_refused(outside: float) -> None:
    """Their chains stay where they are, and independent draws of an Exponential(1) variable stay such draws."""
    seen: list[Tensor] = []

    def walled(z: Tensor) -> Tensor:
        seen.append(torch.where(z > 0, -z, outside).sum(-1))
        return seen[-1]

    chains = generator(4)
    state = hmc.state_at(walled, torch.empty(20_000, 1).exponential_(generator=chains))
    for _ in range(20):
        moved = hmc.transition(walled, state, torch.tensor(0.7), 2, chains)
        refused = ~seen[-1].isfinite()
        assert 0.1 < float(refused.float().mean()) < 0.9
        assert torch.equal(moved.state.z[refused], state.z[refused])
        assert bool((moved.acceptance[refused] == 0).all())
        state = moved.state
    assert_moments(state.z, torch.ones(1), torch.ones(1, 1))


def test_state_s_density_and_gradient_are_those_of_its_place() -> None:
    """After acceptance and refusal alike, so that no stale gradient drives the next trajectory."""
    state = hmc.state_at(gamma, torch.zeros(200, 2))
    for seed in range(3):
        state, acceptance = hmc.transition(gamma, state, torch.tensor(0.9), 2, generator(seed))
    assert 0.1 < float(acceptance.mean()) < 0.9
    for found, expected in zip(state, hmc.state_at(gamma, state.z), strict=True):
        torch.testing.assert_close(found, expected)


def test_same_generator_gives_the_same_draws() -> None:
    """All randomness is the generator's."""
    one, other = (hmc.sample(correlated, torch.zeros(3, 2), 5, generator(5), burn_in=5) for _ in range(2))
    assert torch.equal(one.z, other.z)
    torch.testing.assert_close(one.log_density, correlated(one.z))
