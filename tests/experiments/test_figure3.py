"""Figure 3: its scoring against quadrature, and small runs of all three methods."""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.__main__ import main
from experiments.paper import curves, figure3
from experiments.paper.figure3 import Curve, Scale
from training.data import Digits, ImageSet
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.standard_normal import StandardNormal
from training.models.vae import VAE
from training.networks.mlp import Mlp

SMALL = Scale(hidden=16, chosen_after=500, images=40, candidates=300, burn_in=10, draws=40)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Digits of 8 x 8 pixels, 200 of them to train on."""
    return figure3.some(Digits(dataset="digits").load(tmp_path_factory.mktemp("digits")), 200)


def small_vae(std: float = 1.5) -> VAE:
    """Six binary pixels, three latents, weights large enough that p(z|x) is not p(z)."""
    torch.manual_seed(1)
    mlp = Mlp(architecture="mlp", hidden=(5,))
    vae = VAE(mlp.encoder((1, 2, 3), 3), mlp.decoder(3, (1, 2, 3)), Bernoulli((1, 2, 3)), StandardNormal(3))
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return vae.requires_grad_(requires_grad=False)


def all_images() -> Tensor:
    """Every image of 2 x 3 binary pixels, (64, 1, 2, 3)."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).unflatten(1, (1, 2, 3))


def quadrature(vae: VAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes z (k, 3), log p(x, z) with each node's share of the volume (n, k), and log p(x) (n,)."""
    axis = torch.linspace(-5.0, 5.0, 41)
    z = torch.cartesian_prod(axis, axis, axis)
    volume = 3.0 * math.log(float(axis[1] - axis[0]))
    logits = vae.decode(z)
    log_joint = torch.stack([vae.likelihood.log_prob(logits, one) for one in x]) + vae.prior.log_prob(z) + volume
    return z, log_joint, torch.logsumexp(log_joint.double(), 1)


def test_log_likelihood_is_that_of_quadrature() -> None:
    """The mean log p(x) of all 64 images of a model of six pixels, to 0.03 nats; the same every time it is asked."""
    vae, x = small_vae(), all_images()
    exact = quadrature(vae, x)[2]
    assert float(exact.exp().sum()) == pytest.approx(1.0, abs=1e-4)
    found = figure3.log_likelihood(vae, x, figure3.PAPER)
    assert found == pytest.approx(float(exact.mean()), abs=0.03)
    assert figure3.log_likelihood(vae, x, figure3.PAPER) == found


def test_chains_start_at_draws_of_the_posterior() -> None:
    """Means and variances of 1,000 starts of two images, against quadrature."""
    vae, x = small_vae(), all_images()[[5, 50]]
    z, log_joint, _ = quadrature(vae, x)
    weights = torch.softmax(log_joint, 1)
    mean = weights @ z
    variance = weights @ z.square() - mean.square()
    found = figure3.start(vae, x.repeat_interleave(1000, 0), 5_000, torch.Generator().manual_seed(0)).unflatten(
        0, (2, 1000)
    )
    torch.testing.assert_close(found.mean(1), mean, atol=0.12, rtol=0)
    torch.testing.assert_close(found.var(1), variance, atol=0.12, rtol=0)
    assert float((mean[0] - mean[1]).abs().max()) > 0.4


def test_what_is_scored_is_a_random_choice_binarised_once(digits: ImageSet) -> None:
    """The same choice every time, no image twice, not the first ones; pixels 0 or 1 and the same every time."""
    numbers = torch.arange(1000).reshape(-1, 1, 1, 1)
    numbered = torch.cat([numbers // 250, numbers % 250], 2).to(torch.uint8)
    chosen = figure3.choice(numbered, 100)
    assert torch.equal(chosen, figure3.choice(numbered, 100))
    assert len(chosen.unique(dim=0)) == 100
    assert len(figure3.choice(numbered, 5000).unique(dim=0)) == 1000
    assert not torch.equal(chosen, numbered[:100])
    x = figure3.binarised(digits.test)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(x, figure3.binarised(digits.test))
    assert float(x.mean()) == pytest.approx(float(digits.test.float().mean() / 255.0), abs=0.01)


def test_all_three_methods_are_followed_and_drawn(digits: ImageSet, tmp_path: Path) -> None:
    """Log p(x) rises under each; Monte Carlo EM ends at a quarter; a finished curve is not trained again."""
    begun = {}
    for method in figure3.METHODS:
        folder = tmp_path / f"1000-{method}"
        figure3.follow(Curve(1000, method), digits, folder, 20_000, SMALL)
        begun[method] = (folder / "log.jsonl").read_bytes()
    figure3.report(tmp_path, tmp_path / "out", SMALL)
    assert (tmp_path / "out" / "figure3.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "figure3.csv").open() as file:
        rows = list(csv.DictReader(file))
    seen = [10_000, 15_800, 20_000]
    for method, expected in {"aevb": seen, "wake-sleep": seen, "mcem": [5_000]}.items():
        mine = [row for row in rows if row["method"] == method]
        assert [int(row["samples"]) for row in mine] == expected
        early = max(
            curves.read_log(tmp_path / f"1000-{method}" / f"step-size-{size}")[0]["train_log_likelihood"]
            for size in curves.STEP_SIZES
        )
        assert -64 * math.log(2.0) < early < float(mine[-1]["train_log_likelihood"]) < 0.0, method
    assert Counter(row["draws"] for row in rows) == {"40": 7}
    for method, log in begun.items():
        folder = tmp_path / f"1000-{method}"
        figure3.follow(Curve(1000, method), digits, folder, 20_000, SMALL)
        assert (folder / "log.jsonl").read_bytes() == log


def test_watched_steps_end_with_the_run() -> None:
    """A point beyond the last minibatch is scored at the last."""
    assert curves.watched_steps([10_000, 25_000], 200) == {100, 200}


def test_an_unknown_curve_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message lists what there is, before anything is read."""
    assert main(["figure", "3", "--data", str(tmp_path), "--only", "2000-*"]) == 1
    assert "50000-mcem" in capsys.readouterr().err
