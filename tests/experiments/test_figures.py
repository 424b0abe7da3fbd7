"""The paper's figures as commands: small runs of the real thing."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from experiments.__main__ import main
from experiments.paper import curves, samples
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.standard_normal import StandardNormal
from training.models.vae import VAE
from training.networks.mlp import Mlp


def test_figure_2_follows_its_curves(real_data: Path, tmp_path: Path) -> None:
    """Two curves of Frey Face: points on a logarithmic scale, the bound rises, there is a picture, resumed for free."""
    command = ["figure", "2", "--data", str(real_data), "--runs", str(tmp_path), "--out", str(tmp_path / "out")]
    command += ["--samples", "24000", "--only", "frey-2-*", "--threads", "1"]
    assert main(command) == 0
    with (tmp_path / "out" / "figure2.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"aevb", "wake-sleep"}
    for method in ("aevb", "wake-sleep"):
        mine = [row for row in rows if row["method"] == method]
        assert [int(row["samples"]) for row in mine] == [10_000, 13_300, 17_700, 23_700, 24_000]
        assert float(mine[-1]["test_elbo"]) > float(mine[0]["test_elbo"])
    picture = (tmp_path / "out" / "figure2.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert main(command) == 0
    with (tmp_path / "out" / "figure2.csv").open() as file:
        assert list(csv.DictReader(file)) == rows


def test_an_unknown_curve_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message lists what there is."""
    assert main(["figure", "2", "--data", str(tmp_path), "--only", "cifar-*"]) == 1
    assert "mnist-20-aevb" in capsys.readouterr().err


def test_curves_of_other_days_stay(tmp_path: Path) -> None:
    """What the CSV has of curves that were not trained here is kept, what was trained anew is replaced."""
    path = tmp_path / "figure.csv"
    fields = ("method", "samples", "test_elbo")
    old = [{"method": name, "samples": 100, "test_elbo": -1.5} for name in ("aevb", "mcem")]
    curves.write(old, fields, path)
    new = [{"method": "mcem", "samples": 200, "test_elbo": -1.25}]
    assert curves.with_earlier(new, path, ("method",)) == [old[0], *new]
    assert curves.with_earlier(new, tmp_path / "none.csv", ("method",)) == new


def test_points_are_evenly_spaced_on_a_logarithmic_scale() -> None:
    """Eight a decade, the last one being the end."""
    assert curves.grid(30_000) == [10_000, 13_335, 17_783, 23_714, 30_000]


def test_a_sheet_is_read_row_by_row() -> None:
    """Each latent's image stands where the grid has it."""
    mlp = Mlp(architecture="mlp", hidden=(5,))
    vae = VAE(mlp.encoder((1, 3, 2), 2), mlp.decoder(2, (1, 3, 2)), Bernoulli((1, 3, 2)), StandardNormal(2))
    z = samples.grid(4)
    found = samples.sheet(vae, z, 4)
    assert found.shape == (1, 1, 4 * 3, 4 * 2)
    torch.testing.assert_close(found[0, 0, 3:6, 4:6], torch.sigmoid(vae.decode(z[6:7])).detach()[0, 0])


def test_the_map_s_cells_are_equally_probable() -> None:
    """Symmetric about 0, the first row on top: small first latent left, large second latent above."""
    z = samples.grid(4)
    assert z.shape == (16, 2)
    torch.testing.assert_close(torch.special.ndtr(z[:4, 0]), torch.tensor([0.125, 0.375, 0.625, 0.875]))
    torch.testing.assert_close(torch.special.ndtr(z[::4, 1]), torch.tensor([0.875, 0.625, 0.375, 0.125]))
