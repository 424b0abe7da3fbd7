"""Appendix F: the predictive average against its definition, and a small run of all methods."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments.paper import full_vb as experiment
from training.distributions.gaussian import DiagonalGaussian
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.standard_normal import StandardNormal
from training.models.vae import VAE

PIXELS = 6
SHAPE = (1, 2, 3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Known(nn.Module):
    """A decoder that knows no z: the same logit everywhere."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full(SHAPE, logit))

    def forward(self, z: Tensor) -> Tensor:
        """(n, d) -> (n, 1, 2, 3)."""
        return self.logit.expand(len(z), *SHAPE)


class Ignorant(nn.Module):
    """q(z|x) = p(z)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros."""
        posterior = DiagonalGaussian(torch.zeros(len(x), 2), torch.zeros(len(x), 2))
        return posterior.mean, posterior.log_var


def test_the_predictive_average_is_of_probabilities() -> None:
    """Of two models that ignore z it is log((p1 + p2) / 2), while the bound is the mean of the logarithms."""
    models = [VAE(Ignorant(), Known(logit), Bernoulli(SHAPE), StandardNormal(2)) for logit in (-1.0, 2.0)]
    x = torch.bernoulli(torch.full((9, *SHAPE), 0.5), generator=seeded(3))
    found = experiment.score(models, x)
    ones = x.flatten(1).sum(1).double()
    p = torch.sigmoid(torch.tensor([-1.0, 2.0], dtype=torch.float64))
    logs = torch.stack([ones * each.log() + (PIXELS - ones) * (1 - each).log() for each in p])
    torch.testing.assert_close(found[1], logs.exp().mean(0).log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], logs.mean(0), rtol=1e-5, atol=1e-5)


def test_the_experiment_reports_every_estimate(tmp_path: Path) -> None:
    """Of three curves: four estimates, the difference from MAP at the end, a picture; and the same again, untrained."""
    grey = torch.randint(0, 256, (30, 1, 28, 28), generator=seeded(1)).to(torch.uint8)
    images = experiment.Images(grey, (grey[:20] > 127).float(), (grey[24:] > 127).float())
    chosen = [curve for curve in experiment.CURVES if curve.latent_dim == 5]
    experiment.repeat(chosen, images, tmp_path, tmp_path / "out", 90)
    written = (tmp_path / "out" / "appendix_f.csv").read_text()
    rows = {row["estimate"]: row for row in csv.DictReader(written.splitlines())}
    assert rows.keys() == experiment.ESTIMATES.keys()
    mine, theirs = (float(rows[name]["test_log_likelihood"]) for name in ("full-vb-draws", "map"))
    assert float(rows["full-vb-draws"]["over_map"]) == pytest.approx(mine - theirs, abs=0.01)
    assert rows["map"]["over_map"] == rows["map"]["evidence_bound"] == ""
    assert float(rows["full-vb-draws"]["evidence_bound"]) < 0.0
    assert (tmp_path / "out" / "appendix_f.png").read_bytes().startswith(b"\x89PNG")
    experiment.repeat(chosen, images, tmp_path, tmp_path / "out", 90)
    assert (tmp_path / "out" / "appendix_f.csv").read_text() == written
