"""ADVI: on models whose posterior, evidence or best Gaussian is known, it finds them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import optimize, special, stats
from torch import Tensor
from torch.distributions import MultivariateNormal, constraints
from torch.distributions.constraints import Constraint

from training.distributions.gaussian import LOG_2_PI, DiagonalGaussian
from training.errors import DivergedError
from training.inference.advi import (
    Approximation,
    Coordinates,
    Density,
    FullRankGaussian,
    InterruptedFit,
    _Ascent,
    fit,
    laplace,
)

Array = NDArray[np.float64]
ACCURATE: dict[str, Any] = {"draws": 64, "max_steps": 3000, "tolerance": 1e-6, "dtype": torch.float64}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(x: Tensor, mean: Tensor | float, std: float) -> Tensor:
    return -0.5 * ((x - mean) / std).square() - 0.5 * LOG_2_PI - math.log(std)


class Regression:
    """y = X w + N(0, 0.8^2), w ~ N(0, 4 I), X's columns correlated: posterior and evidence are Gaussians."""

    noise, scale = 0.8, 2.0

    def __init__(self) -> None:
        mix = torch.tensor([[1.0, 0.8, 0.3], [0.0, 0.6, 0.4], [0.0, 0.0, 0.7]], dtype=torch.float64)
        generator = seeded(1)
        self.design = torch.randn(60, 3, generator=generator, dtype=torch.float64) @ mix
        truth = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
        self.y = self.design @ truth + self.noise * torch.randn(60, generator=generator, dtype=torch.float64)
        eye = torch.eye(3, dtype=torch.float64)
        self.precision = self.design.T @ self.design / self.noise**2 + eye / self.scale**2
        self.covariance = self.precision.inverse()
        self.mean = self.covariance @ self.design.T @ self.y / self.noise**2

    def log_joint(self, w: Tensor) -> Tensor:
        """(n, 3) -> (n,)."""
        return normal(self.y, w @ self.design.T, self.noise).sum(1) + normal(w, 0.0, self.scale).sum(1)

    def log_evidence(self) -> float:
        """log N(y; 0, 0.64 I + 4 X X^T)."""
        covariance = self.noise**2 * torch.eye(60) + self.scale**2 * self.design @ self.design.T
        return float(MultivariateNormal(torch.zeros(60, dtype=torch.float64), covariance).log_prob(self.y))

    def fit(self, family: Literal["meanfield", "fullrank"]) -> Approximation:
        """To high accuracy."""
        return fit(self.log_joint, {"w": ((3,), constraints.real)}, seeded(2), family=family, **ACCURATE)


def best_gaussian(log_density: Callable[[Array], Array], dim: int) -> tuple[Array, Array, float]:
    """Mean, std and bound of the best N(mean, diag(std^2)) for a density over (n, dim), by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    eps = np.stack(np.meshgrid(*[nodes] * dim), -1).reshape(-1, dim)
    mass = np.stack(np.meshgrid(*[weights / math.sqrt(2.0 * math.pi)] * dim), -1).reshape(-1, dim).prod(1)

    def loss(q: Array) -> float:
        expected = mass @ log_density(q[:dim] + np.exp(q[dim:]) * eps)
        return -float(expected + q[dim:].sum() + 0.5 * dim * (1.0 + LOG_2_PI))

    best = optimize.minimize(loss, np.zeros(2 * dim), method="BFGS")
    return best.x[:dim], np.exp(best.x[dim:]), -best.fun


def assert_is_best(answer: Approximation, log_density: Callable[[Array], Array]) -> None:
    """Mean and std within 2 % (a mean near 0: of the std), and the bound within its error."""
    q = answer.q
    assert isinstance(q, DiagonalGaussian)
    mean, std, bound = (torch.as_tensor(part) for part in best_gaussian(log_density, len(q.mean)))
    assert bool(((q.mean - mean).abs() < 0.02 * torch.maximum(mean.abs(), std)).all())
    torch.testing.assert_close((0.5 * q.log_var).exp(), std, rtol=0.02, atol=0.0)
    assert answer.elbo == pytest.approx(float(bound), abs=4.0 * answer.elbo_standard_error + 1e-3)


def test_the_mean_of_a_normal() -> None:
    """One Gaussian parameter: q is the posterior, the bound is the evidence."""
    x = 2.0 + 1.5 * torch.randn(40, generator=seeded(0), dtype=torch.float64)
    precision = 40 / 1.5**2 + 1 / 10.0**2
    mean = float(x.sum()) / 1.5**2 / precision

    def log_joint(mu: Tensor) -> Tensor:
        return normal(x, mu[:, None], 1.5).sum(1) + normal(mu, 0.0, 10.0)

    answer = fit(log_joint, {"mu": ((), constraints.real)}, seeded(1), **ACCURATE)
    covariance = 1.5**2 * torch.eye(40, dtype=torch.float64) + 100.0
    evidence = float(MultivariateNormal(torch.zeros(40, dtype=torch.float64), covariance).log_prob(x))
    draws = answer.draw(100_000, seeded(2))["mu"]
    assert answer.converged
    assert float(answer.q.mean) == pytest.approx(mean, rel=0.02)
    assert float(draws.mean()) == pytest.approx(mean, rel=0.02)
    assert float(draws.std()) == pytest.approx(precision**-0.5, rel=0.02)
    assert answer.elbo == pytest.approx(evidence, abs=0.02)
    assert float(answer.trace.max()) < evidence + 0.02


def test_full_rank_regression_is_exact() -> None:
    """Posterior mean, every covariance and the evidence."""
    model = Regression()
    answer = model.fit("fullrank")
    assert isinstance(answer.q, FullRankGaussian)
    scale = model.covariance.diagonal().sqrt()
    error = answer.q.cholesky @ answer.q.cholesky.T - model.covariance
    torch.testing.assert_close(answer.q.mean, model.mean, rtol=0.02, atol=0.0)
    assert float((error / scale.outer(scale)).abs().max()) < 0.02
    assert answer.elbo == pytest.approx(model.log_evidence(), abs=0.02)
    assert float(answer.trace.max()) < model.log_evidence() + 0.02


def test_mean_field_regression_has_the_conditional_variances() -> None:
    """1 / diag(precision), less than the marginal ones; the bound misses the evidence by the known divergence.

    Source: Bishop (2006), section 10.1.2.
    """
    model = Regression()
    answer = model.fit("meanfield")
    assert isinstance(answer.q, DiagonalGaussian)
    gap = 0.5 * float(model.precision.diagonal().log().sum() - model.precision.logdet())
    error = 4.0 * answer.elbo_standard_error
    torch.testing.assert_close(answer.q.mean, model.mean, rtol=0.02, atol=0.0)
    torch.testing.assert_close(answer.q.log_var.exp(), 1.0 / model.precision.diagonal(), rtol=0.02, atol=0.0)
    assert error < 0.5 * gap
    assert answer.elbo == pytest.approx(model.log_evidence() - gap, abs=error)


def test_a_positive_rate() -> None:
    """Gamma prior, Poisson counts: the best Gaussian over log rate, and E[rate] under it."""
    counts = torch.tensor([3.0, 5.0, 2.0, 4.0, 1.0, 6.0], dtype=torch.float64)

    def log_joint(rate: Tensor) -> Tensor:
        likelihood = counts * rate[:, None].log() - rate[:, None] - torch.lgamma(counts + 1.0)
        return likelihood.sum(1) + rate.log() - rate

    def log_density(u: Array) -> Array:
        rate = np.exp(u[:, 0])
        likelihood = stats.poisson.logpmf(counts.numpy(), rate[:, None]).sum(1)
        return likelihood + stats.gamma.logpdf(rate, 2.0) + u[:, 0]

    answer = fit(log_joint, {"rate": ((), constraints.positive)}, seeded(1), **ACCURATE)
    assert_is_best(answer, log_density)
    mean, std, _ = best_gaussian(log_density, 1)
    expected = float(np.exp(mean + 0.5 * std**2)[0])
    assert float(answer.mean(100_000, seeded(2))["rate"]) == pytest.approx(expected, rel=0.02)
    log_mass = special.gammaln(23.0) - 23.0 * math.log(7.0) - special.gammaln(counts.numpy() + 1.0).sum()
    assert answer.elbo < log_mass + 3.0 * answer.elbo_standard_error


def test_a_probability() -> None:
    """Beta(2, 3) prior, 9 of 11 trials: the best Gaussian over the logit; the bound stays below the evidence."""

    def log_joint(p: Tensor) -> Tensor:
        prior = p.log() + 2.0 * (1.0 - p).log() - float(special.betaln(2.0, 3.0))
        return prior + 9.0 * p.log() + 2.0 * (1.0 - p).log()

    def log_density(u: Array) -> Array:
        p = special.expit(u[:, 0])
        return stats.beta.logpdf(p, 2.0, 3.0) + 9.0 * np.log(p) + 2.0 * np.log1p(-p) + np.log(p * (1.0 - p))

    answer = fit(log_joint, {"p": ((), constraints.interval(0.0, 1.0))}, seeded(1), **ACCURATE)
    assert_is_best(answer, log_density)
    evidence = special.betaln(11.0, 5.0) - special.betaln(2.0, 3.0)
    assert answer.elbo < evidence + 3.0 * answer.elbo_standard_error


def test_shares_of_a_whole() -> None:
    """Multinomial counts under a uniform prior: the best Gaussian over stick-breaking coordinates."""
    counts = torch.tensor([12.0, 5.0, 8.0], dtype=torch.float64)

    def log_density(u: Array) -> Array:
        first = special.expit(u[:, 0] - math.log(2.0))
        second = special.expit(u[:, 1])
        shares = np.stack([first, (1.0 - first) * second, (1.0 - first) * (1.0 - second)], -1)
        log_jacobian = np.log(first * (1.0 - first)) + np.log(second * (1.0 - second)) + np.log(1.0 - first)
        return np.log(shares) @ counts.numpy() + log_jacobian

    answer = fit(
        lambda shares: shares.log() @ counts,
        {"shares": ((3,), constraints.simplex)},
        seeded(1),
        **ACCURATE,
    )
    assert_is_best(answer, log_density)


SPACES: dict[str, tuple[tuple[int, ...], Constraint]] = {
    "real": ((2, 2), constraints.real),
    "positive": ((3,), constraints.positive),
    "above 2": ((3,), constraints.greater_than(2.0)),
    "below -1": ((3,), constraints.less_than(-1.0)),
    "probability": ((3,), constraints.interval(0.0, 1.0)),
    "interval": ((), constraints.interval(-1.0, 3.0)),
    "simplex": ((4,), constraints.simplex),
    "simplices": ((2, 3), constraints.simplex),
}


@pytest.mark.parametrize("space", SPACES)
def test_the_log_jacobian_is_that_of_the_map(space: str) -> None:
    """Against automatic differentiation, whose Jacobian of a simplex leaves out the last share."""
    shape, constraint = SPACES[space]
    coordinates = Coordinates({"value": (shape, constraint)})
    u = 2.0 * torch.randn(5, coordinates.dim, generator=seeded(3), dtype=torch.float64)

    def free(row: Tensor) -> Tensor:
        value = coordinates.constrain(row[None])[0]["value"][0]
        return (value[..., :-1] if constraint is constraints.simplex else value).flatten()

    _, log_jacobian = coordinates.constrain(u)
    for row, answer in zip(u, log_jacobian, strict=True):
        jacobian: Tensor = torch.func.jacrev(free)(row)
        torch.testing.assert_close(answer, torch.linalg.slogdet(jacobian)[1])


def test_coordinates_go_round() -> None:
    """u -> parameters -> u, for all kinds at once; every value lies where it should, and the log-Jacobians add up."""
    together = Coordinates(SPACES)
    u = 2.0 * torch.randn(50, together.dim, generator=seeded(4), dtype=torch.float64)
    values, log_jacobian = together.constrain(u)
    torch.testing.assert_close(together.unconstrain(values), u)
    alone = torch.zeros(50, dtype=torch.float64)
    for part, (name, (shape, constraint)) in zip(u.split(together.sizes, 1), SPACES.items(), strict=True):
        assert values[name].shape == (50, *shape)
        assert bool(constraint.check(values[name]).all())
        alone += Coordinates({name: (shape, constraint)}).constrain(part)[1]
    torch.testing.assert_close(log_jacobian, alone)


def test_the_full_rank_gaussian_is_a_gaussian() -> None:
    """Entropy as torch has it; draws have its mean and covariance; the upper triangle of `factor` is unused."""
    factor = torch.tensor([[0.3, 9.0, 9.0], [-0.8, -0.5, 9.0], [0.4, 1.1, 0.1]], dtype=torch.float64)
    q = FullRankGaussian(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), factor)
    outside = MultivariateNormal(q.mean, scale_tril=q.cholesky)
    draws = q.draw(torch.randn(200_000, 3, generator=seeded(5), dtype=torch.float64))
    torch.testing.assert_close(q.entropy(), outside.entropy())
    torch.testing.assert_close(draws.mean(0), q.mean, atol=0.02, rtol=0.0)
    torch.testing.assert_close(draws.T.cov(), outside.covariance_matrix, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("family", ["meanfield", "fullrank"])
def test_the_mean_log_weight_is_the_bound(family: str) -> None:
    """With log q at the draws or its closed form: the same number, and without spread where q is the posterior."""
    model = Regression()
    exact = model.covariance if family == "fullrank" else torch.diag(1.0 / model.precision.diagonal())
    cholesky = torch.linalg.cholesky(exact)
    factor = cholesky.tril(-1) + cholesky.diagonal().log().diag()
    full = FullRankGaussian(model.mean, factor)
    q = full if family == "fullrank" else DiagonalGaussian(model.mean, exact.diagonal().log())
    density = Density(model.log_joint, Coordinates({"w": ((3,), constraints.real)}))
    eps = torch.randn(100_000, 3, generator=seeded(6), dtype=torch.float64)
    weights = density.log_weights(q, eps)
    assert float(weights.mean()) == pytest.approx(float(density.elbo(q, eps)), abs=0.03)
    if family == "fullrank":
        torch.testing.assert_close(weights, torch.full_like(weights, model.log_evidence()))


def test_the_step_sizes_are_the_papers() -> None:
    """Under a log joint of known slopes 2, -4, 1, the mean moves as equations 10 and 11 say."""
    slopes = iter([2.0, -4.0, 1.0])
    density = Density(lambda mu: next(slopes) * mu, Coordinates({"mu": ((), constraints.real)}))
    ascent = _Ascent(density, DiagonalGaussian(*torch.zeros(2, 1, dtype=torch.float64)), eta=0.5)
    ascent.run(3, 1, seeded(0))
    expected = 0.5 * 2.0 / (1.0 + 2.0)
    expected += 0.5 * 2.0**-0.5 * -4.0 / (1.0 + math.sqrt(0.1 * 16.0 + 0.9 * 4.0))
    expected += 0.5 * 3.0**-0.5 * 1.0 / (1.0 + math.sqrt(0.1 * 1.0 + 0.9 * (0.1 * 16.0 + 0.9 * 4.0)))
    assert float(ascent.q.mean) == pytest.approx(expected)


def test_seeds_reproduce() -> None:
    """The same seed gives the same answer bit for bit, another seed another; so do draws."""

    def run(seed: int) -> Approximation:
        return fit(
            lambda mu, tau: normal(mu, 1.0, 2.0).sum(1) + tau.log() - tau,
            {"mu": ((2,), constraints.real), "tau": ((), constraints.positive)},
            seeded(seed),
            max_steps=100,
        )

    first, again, other = run(1), run(1), run(2)
    assert first.elbo == again.elbo != other.elbo
    assert torch.equal(first.trace, again.trace)
    assert torch.equal(first.draw(5, seeded(3))["mu"], again.draw(5, seeded(3))["mu"])
    assert not torch.equal(first.draw(5, seeded(3))["mu"], first.draw(5, seeded(4))["mu"])
    assert first.draw(5, seeded(3))["tau"].dtype == torch.float32
    assert not first.converged


def test_a_bound_that_is_no_number_stops_it() -> None:
    """The logarithm of what may be negative; the message says what to check, and a start nearer helps."""

    def log_joint(rate: Tensor) -> Tensor:
        return 2499.0 * rate.log() - 50.0 * rate

    spaces = {"rate": ((), constraints.real)}
    with pytest.raises(DivergedError, match=r"check that log_joint is finite .* or give a `start`"):
        fit(log_joint, spaces, seeded(0), max_steps=200)
    answer = fit(log_joint, spaces, seeded(0), max_steps=200, start={"rate": torch.tensor(50.0)})
    assert float(answer.q.mean) == pytest.approx(50.0, rel=0.02)


@pytest.mark.parametrize("start", [{"rate": -1.0}, {"rate": [1.0, 2.0]}, {"rat": 1.0}])
def test_a_start_must_be_possible(start: dict[str, float]) -> None:
    """Inside the constraint, of the parameter's shape and name."""
    with pytest.raises(ValueError, match="rate"):
        fit(
            lambda rate: rate.log() - rate,
            {"rate": ((), constraints.positive)},
            seeded(0),
            start={name: torch.tensor(value) for name, value in start.items()},
        )


def test_divergence_late_stops_it() -> None:
    """Not only the search for a step size looks at the bound."""
    calls = iter(range(10_000))

    def log_joint(mu: Tensor) -> Tensor:
        return normal(mu, 0.0, 1.0) * (math.nan if next(calls) > 300 else 1.0)

    with pytest.raises(DivergedError, match="the ELBO is nan after"):
        fit(log_joint, {"mu": ((), constraints.real)}, seeded(0))


def test_an_interrupted_fit_gives_what_it_has() -> None:
    """Ctrl-C after 500 steps raises InterruptedFit with the average of those steps, not converged."""
    calls = iter(range(10_000))

    def log_joint(mu: Tensor) -> Tensor:
        if next(calls) == 800:
            raise KeyboardInterrupt
        return normal(mu, 3.0, 1.0)

    with pytest.raises(InterruptedFit) as caught:
        fit(log_joint, {"mu": ((), constraints.real)}, seeded(0), tolerance=0.0)
    answer = caught.value.approximation
    assert not answer.converged
    assert 400 < answer.steps < 600
    assert len(answer.trace) == (answer.steps - 50) // 100 + 1
    assert float(answer.q.mean) == pytest.approx(3.0, abs=0.1)


def test_a_given_learning_rate_is_used() -> None:
    """One far too small leaves q where it began; the search would have found a better one."""
    spaces = {"mu": ((), constraints.real)}
    slow = fit(lambda mu: normal(mu, 30.0, 2.0), spaces, seeded(0), learning_rate=1e-4, max_steps=300)
    searched = fit(lambda mu: normal(mu, 30.0, 2.0), spaces, seeded(0), max_steps=300)
    assert abs(float(slow.q.mean)) < 0.1
    assert float(searched.q.mean) > 10.0


@pytest.mark.parametrize("family", ["meanfield", "fullrank"])
def test_preconditioned_it_begins_at_the_optimum(family: Literal["meanfield", "fullrank"]) -> None:
    """Where the posterior is a Gaussian, far away and narrow, after the fewest steps; without, it is not near."""
    design = (
        torch.randn(60, 2, generator=seeded(1), dtype=torch.float64) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]]).double()
    )
    y = design @ torch.tensor([500.0, -2.0], dtype=torch.float64)

    def log_joint(w: Tensor) -> Tensor:
        return normal(y, w @ design.T, 0.1).sum(1)

    precision = design.T @ design / 0.1**2
    variance = precision.inverse().diagonal() if family == "fullrank" else 1.0 / precision.diagonal()
    common: dict[str, Any] = {"family": family, "max_steps": 200, "draws": 64, "dtype": torch.float64}
    answer = fit(log_joint, {"w": ((2,), constraints.real)}, seeded(2), precondition=True, **common)
    draws = answer.draw(20_000, seeded(3))["w"]
    assert float(((draws.mean(0) - torch.tensor([500.0, -2.0])).abs() / variance.sqrt()).max()) < 0.1
    torch.testing.assert_close(draws.std(0), variance.sqrt(), rtol=0.05, atol=0.0)
    assert isinstance(answer.q, FullRankGaussian if family == "fullrank" else DiagonalGaussian)
    plain = fit(log_joint, {"w": ((2,), constraints.real)}, seeded(2), **common)
    assert plain.elbo < answer.elbo - 100.0


def test_the_laplace_approximation() -> None:
    """Of a Gamma(3, 2) variable's logarithm: mode log(3 / 2), precision 3; None where there is no mode."""
    density = Density(lambda x: 2.0 * x.log() - 2.0 * x, Coordinates({"x": ((), constraints.positive)}))
    start = torch.tensor([-3.0], dtype=torch.float64)
    for family in ("meanfield", "fullrank"):
        found = laplace(density, start, family)
        assert found is not None
        exact = DiagonalGaussian(torch.tensor([math.log(1.5)]), torch.tensor([-math.log(3.0)]))
        eps = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        torch.testing.assert_close(found.draw(eps), exact.draw(eps), atol=1e-3, rtol=0.0, check_dtype=False)
    precision = torch.tensor([[4.0, 3.0], [3.0, 9.0]], dtype=torch.float64)
    correlated = Density(lambda w: -0.5 * (w @ precision * w).sum(1), Coordinates({"w": ((2,), constraints.real)}))
    full, mean = (laplace(correlated, torch.ones(2).double(), family) for family in ("fullrank", "meanfield"))
    assert isinstance(full, FullRankGaussian)
    assert isinstance(mean, DiagonalGaussian)
    torch.testing.assert_close(full.cholesky @ full.cholesky.T, precision.inverse())
    torch.testing.assert_close(mean.log_var.exp(), 1.0 / precision.diagonal())
    kinked = Density(lambda x: -10.0 * (x - 0.3).abs() - 0.5 * x.square(), Coordinates({"x": ((), constraints.real)}))
    assert laplace(kinked, start, "fullrank") is None
    rising = Density(lambda x: x.exp(), Coordinates({"x": ((), constraints.real)}))
    flat = Density(lambda x: 0.0 * x, Coordinates({"x": ((), constraints.real)}))
    assert laplace(rising, start, "fullrank") is None
    assert laplace(flat, start, "fullrank") is None


def test_a_frame_changes_coordinates_alone() -> None:
    """The density of v = (u - mean) / scale has the integral of that of u."""
    coordinates = Coordinates({"x": ((), constraints.real)})
    frame = DiagonalGaussian(torch.tensor([3.0]), torch.tensor([1.2]))
    grid = torch.linspace(-40.0, 40.0, 20_001)[:, None]
    framed = Density(lambda x: normal(x, 2.0, 1.5), coordinates, frame).log_prob(grid)
    assert float(framed.exp().sum() * 80.0 / 20_000) == pytest.approx(1.0, abs=1e-3)


def test_a_constraint_without_a_bijection_is_refused() -> None:
    """By the parameter's name, with those that can be had."""
    with pytest.raises(ValueError, match=r"switch: no bijection .* simplex"):
        Coordinates({"switch": ((), constraints.boolean)})


def test_a_log_joint_must_keep_the_draws_apart() -> None:
    """One that sums over everything would be wrong in silence."""
    with pytest.raises(ValueError, match=r"gave shape \(\) for 16 draws"):
        fit(lambda mu: mu.sum(), {"mu": ((2,), constraints.real)}, seeded(0))


def test_it_stops_when_the_bound_stops_rising() -> None:
    """Sooner under a loose tolerance; the trace rises by and large."""

    def steps(tolerance: float) -> Tensor:
        spaces = {"mu": ((), constraints.real)}
        return fit(lambda mu: normal(mu, 30.0, 2.0), spaces, seeded(0), tolerance=tolerance, max_steps=2000).trace

    loose, tight = steps(1e-2), steps(1e-9)
    assert len(loose) < len(tight) == 21
    assert float(loose[-1]) > float(loose[0]) - 0.01
    assert all(float(new) > float(old) - 0.05 for old, new in pairwise(tight))
