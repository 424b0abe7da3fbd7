"""The model of docs/mathematics.md's figure: what the page derives holds for it, by integration."""

from __future__ import annotations

import pytest
import torch

from docs.mathematics import DRAWS, SETS, STEP, X, exact, importance_weighted, model, spreads
from training.objectives.elbo import monte_carlo_elbo


def test_the_evidence_is_the_bound_and_the_gap() -> None:
    """log p(x) = ELBO + KL(q(z|x) || p(z|x)), each integrated by itself; the posterior integrates to 1."""
    found = exact(model())
    assert found.gap > 0.01
    assert found.elbo + found.gap == pytest.approx(found.log_evidence, abs=1e-6)
    assert float(found.posterior.sum()) * STEP == pytest.approx(1.0, abs=1e-6)


def test_both_estimators_estimate_the_bound() -> None:
    """Their means equal the integral to four standard errors, and their spreads fall with the square root of L."""
    vae, found = model(), exact(model())
    eps = vae.noise(64, SETS, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for bound in (monte_carlo_elbo(vae, X.expand(SETS, 1, 2, 2), eps), vae.bound(X.expand(SETS, 1, 2, 2), eps)):
            error = 4 * float(bound.elbo.std()) / SETS**0.5
            assert float(bound.elbo.mean()) == pytest.approx(found.elbo, abs=error)
    for one, many in zip(spreads(vae)[0], spreads(vae)[-1], strict=True):
        assert one / many == pytest.approx(DRAWS[-1] ** 0.5, rel=0.15)


def test_b_varies_less_where_the_decoder_hardly_uses_z() -> None:
    """There estimator A varies several times as much."""
    a, b = spreads(model(0.03))[0]
    assert a > 4 * b


def test_the_importance_weighted_bound_approaches_the_evidence() -> None:
    """It lies between the ELBO and log p(x), and is close with many draws."""
    found = exact(model())
    few, many = importance_weighted(model(), 4), importance_weighted(model(), 1024)
    assert found.elbo < few < many < found.log_evidence + 0.005
    assert many == pytest.approx(found.log_evidence, abs=0.01)
