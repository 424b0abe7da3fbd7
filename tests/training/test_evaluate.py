"""Test figures: exact where the model is exact, resumed to the same figures, and silent where there are none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from service.contract.corruption import FAMILIES
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.standard_normal import StandardNormal
from training.evaluation.evaluate import BLOCK, Share, likelihood, report, restoration
from training.loop.precision import computes_bfloat16
from training.models.restoration import Recognition
from training.models.vae import VAE
from training.networks.mlp import Mlp
from training.networks.unet import UNetSettings

if TYPE_CHECKING:
    from tests.training.conftest import LinearGaussian


def black_and_white(n: int) -> Tensor:
    """Images whose binarisation is certain: (n, 1, 2, 3) of 0 and 255."""
    return 255 * torch.randint(0, 2, (n, 1, 2, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.mark.parametrize("draws", [1, 7, 4500])
def test_figures_of_the_exact_posterior_are_exact(linear_gaussian: LinearGaussian, draws: int, tmp_path: Path) -> None:
    """With q the posterior, -NLL is the mean of log p(x) whatever the number of samples, and its error that of a mean.

    4,500 samples are more than are decoded at once.
    """
    n = 7 if draws > 1000 else 250
    images = black_and_white(n)
    exact = linear_gaussian.log_prob(images.float() / 255.0)
    found = likelihood(linear_gaussian.vae(), images, draws, 1, tmp_path / "evaluation.pt", dynamic=True)
    assert found["test_nll_nats"] == pytest.approx(-float(exact.mean()), abs=2e-3)
    assert found["test_nll_standard_error_nats"] == pytest.approx(float(exact.std()) / math.sqrt(n), abs=2e-3)
    assert (found["images"], found["importance_samples"], found["seed"]) == (n, draws, 1)


def test_elbo_is_within_four_standard_errors(linear_gaussian: LinearGaussian, tmp_path: Path) -> None:
    """One draw an image estimates the bound, here log p(x), without bias."""
    images = black_and_white(2_000)
    exact = float(linear_gaussian.log_prob(images.float() / 255.0).mean())
    found = likelihood(linear_gaussian.vae(), images, 1, 2, tmp_path / "evaluation.pt", dynamic=True)
    # The images are the same on both sides: only the draws are left to chance.
    generous = 4.0 * float(found["test_elbo_standard_error_nats"])
    assert abs(float(found["test_elbo_nats"]) - exact) < generous < 1.0


def test_nll_of_another_posterior_is_between_bound_and_truth(linear_gaussian: LinearGaussian, tmp_path: Path) -> None:
    """With 500 samples from a wrong q the NLL is the exact one within 0.01, and the ELBO is clearly worse."""
    images = black_and_white(300)
    exact = float(linear_gaussian.log_prob(images.float() / 255.0).mean())
    found = likelihood(linear_gaussian.vae(0.2, 1.5), images, 500, 3, tmp_path / "evaluation.pt", dynamic=True)
    assert found["test_nll_nats"] == pytest.approx(-exact, abs=0.01)
    assert float(found["test_elbo_nats"]) < exact - 0.1


class Interrupting(nn.Module):
    """An encoder that somebody interrupts at its n-th call; it also counts them."""

    def __init__(self, encoder: nn.Module, at: int) -> None:
        super().__init__()
        self.encoder, self.at, self.calls = encoder, at, 0

    def forward(self, x: Tensor) -> Any:
        """As the encoder's."""
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.encoder(x)


def test_interrupted_evaluation_goes_on_where_it_was(linear_gaussian: LinearGaussian, tmp_path: Path) -> None:
    """Interrupted after some blocks, the second call scores only the rest and reports the very same figures."""
    images = black_and_white(4 * BLOCK + 30)
    whole = likelihood(linear_gaussian.vae(0.3, 1.4), images, 5, 4, tmp_path / "whole.pt", dynamic=True)

    def model(at: int) -> VAE:
        vae = linear_gaussian.vae(0.3, 1.4)
        vae.encoder = Interrupting(vae.encoder, at)
        return vae

    counted = model(at=-1)
    likelihood(counted, images, 5, 4, tmp_path / "counted.pt", dynamic=True)
    calls = counted.encoder.calls
    partial = tmp_path / "evaluation.pt"
    with pytest.raises(KeyboardInterrupt):
        likelihood(model(at=calls // 2), images, 5, 4, partial, dynamic=True)
    resumed = model(at=-1)
    assert likelihood(resumed, images, 5, 4, partial, dynamic=True) == whole
    assert resumed.encoder.calls < calls


def test_shares_add_up_to_the_whole(linear_gaussian: LinearGaussian, tmp_path: Path) -> None:
    """Three shares, each of its own blocks, and then the whole, which scores nothing anew and has the same figures."""
    images = black_and_white(4 * BLOCK + 30)
    whole = likelihood(linear_gaussian.vae(0.3, 1.4), images, 5, 4, tmp_path / "whole.pt", dynamic=True)
    partial, parts = tmp_path / "evaluation.pt", []
    for number in (2, 1, 3):
        vae = linear_gaussian.vae(0.3, 1.4)
        parts.append(likelihood(vae, images, 5, 4, partial, dynamic=True, share=Share(number, 3)))
    assert [part["images"] for part in parts] == [130, 200, 100]
    mean = sum(float(part["test_nll_nats"]) * int(part["images"]) for part in parts) / len(images)
    assert mean == pytest.approx(float(whole["test_nll_nats"]), abs=1e-3)
    idle = linear_gaussian.vae(0.3, 1.4)
    idle.encoder = Interrupting(idle.encoder, at=1)
    assert likelihood(idle, images, 5, 4, partial, dynamic=True) == whole


@pytest.mark.skipif(not computes_bfloat16(torch.device("cpu")), reason="this CPU does not compute with bfloat16")
def test_bfloat16_scores_another_model_nearly_as_well(tmp_path: Path) -> None:
    """The networks compute in bfloat16, the figures say so, and they are the same within a few hundredths of a nat."""
    mlp = Mlp(architecture="mlp", hidden=(6,))
    torch.manual_seed(1)
    vae = VAE(mlp.encoder((1, 2, 3), 2), mlp.decoder(2, (1, 2, 3)), Bernoulli((1, 2, 3)), StandardNormal(2))
    images = black_and_white(200)
    exact = likelihood(vae, images, 50, 1, tmp_path / "exact.pt", dynamic=True)
    kinds = set()
    vae.decoder.register_forward_hook(lambda *call: kinds.add(call[2].dtype))
    lower = likelihood(vae, images, 50, 1, tmp_path / "lower.pt", dynamic=True, precision="bfloat16")
    assert kinds == {torch.bfloat16}
    assert lower.pop("precision") == "bfloat16"
    assert lower["test_nll_nats"] == pytest.approx(exact["test_nll_nats"], abs=0.05)


@pytest.mark.parametrize("change", ["weights", "draws", "seed", "images", "dynamic"])
def test_partial_evaluation_of_something_else_is_not_used(
    change: str, linear_gaussian: LinearGaussian, tmp_path: Path
) -> None:
    """Other weights, samples, seed, images or binarisation are scored anew."""
    partial, images = tmp_path / "evaluation.pt", black_and_white(50)
    likelihood(linear_gaussian.vae(), images, 3, 1, partial, dynamic=True)
    # The same pixels in other places: as many images, other images.
    arguments = {
        "weights": (linear_gaussian.vae(0.5), images, 3, 1),
        "draws": (linear_gaussian.vae(), images, 4, 1),
        "seed": (linear_gaussian.vae(), images, 3, 2),
        "images": (linear_gaussian.vae(), 255 - images, 3, 1),
        "dynamic": (linear_gaussian.vae(), images, 3, 1),
    }[change]
    dynamic = change != "dynamic"
    fresh = likelihood(*arguments, tmp_path / "fresh.pt", dynamic=dynamic)
    assert likelihood(*arguments, partial, dynamic=dynamic) == fresh


def test_grey_images_have_no_nll(tmp_path: Path) -> None:
    """A grey level has no probability under a Bernoulli pixel: only the bound is reported, and it says so."""
    mlp = Mlp(architecture="mlp", hidden=(6,))
    torch.manual_seed(1)
    vae = VAE(mlp.encoder((1, 2, 3), 2), mlp.decoder(2, (1, 2, 3)), Bernoulli((1, 2, 3)), StandardNormal(2))
    images = torch.randint(0, 256, (120, 1, 2, 3), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    found = likelihood(vae, images, 50, 1, tmp_path / "evaluation.pt", dynamic=False)
    assert found["binarisation"] == "none (grey levels)"
    assert not [key for key in found if "nll" in key or "importance" in key]
    assert float(found["test_elbo_nats"]) < 0.0


def test_single_test_image_gives_figures_that_are_numbers(linear_gaussian: LinearGaussian, tmp_path: Path) -> None:
    """A folder of a few images has one to test on: no figure of the manifest is NaN, which JSON does not have."""
    found = likelihood(linear_gaussian.vae(), black_and_white(1), 3, 1, tmp_path / "evaluation.pt", dynamic=True)
    json.dumps(found, allow_nan=False)


def test_decibels_of_corrupted_images_are_those_of_the_noise() -> None:
    """Of noise on middle grey, which no end of the scale cuts, PSNR is -20 log10(sigma): 33.98, 26.02 and 20 dB."""
    mlp = Mlp(architecture="mlp", hidden=(6,))
    torch.manual_seed(1)
    vae = VAE(mlp.encoder((1, 16, 16), 2), mlp.decoder(2, (1, 16, 16)), Bernoulli((1, 16, 16)), StandardNormal(2))
    planes, families = 2 + len(FAMILIES), len(FAMILIES)
    correction = UNetSettings(channels=(4,)).network(2 + planes, 2, (16, 16))
    recognition = Recognition(mlp.encoder((planes, 16, 16), 2), mlp.encoder((2, 16, 16), families), correction)
    table = restoration(vae, recognition, torch.full((250, 1, 16, 16), 128).to(torch.uint8), 1)
    for sigma in (0.02, 0.05, 0.1):
        row = table["gaussian"][str(sigma)]
        assert row["noisy_db"] == pytest.approx(-20.0 * math.log10(sigma), abs=0.1)
        assert 0.0 <= row["worse"] <= 1.0
    # A tenth of the pixels is 0 or 1, each 1/2 away from grey: an error of 0.1 / 4.
    assert table["salt-and-pepper"]["0.1"]["noisy_db"] == pytest.approx(-10.0 * math.log10(0.1 / 4.0), abs=0.1)
    assert table["masking"]["0.5"]["noisy_db"] == pytest.approx(-10.0 * math.log10(0.5 * 0.502**2), abs=0.1)


def test_what_restores_worse_than_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """By family: the gain, and the level's error beside that of the best constant."""

    def row(auto_db: float, error: float) -> dict[str, float]:
        return {"noisy_db": 20.0, "restored_db": 30.0, "auto_db": auto_db, "worse": 0.0, "level_error": error}

    report({"gaussian": {"0.1": row(25.0, 0.1), "0.4": row(23.0, 0.3)}})
    assert capsys.readouterr().err == (
        "restoring gaussian: +4.0 dB; level off by a factor of 1.22 on average (2.00 for the best constant)\n"
    )
    report({"poisson": {"0.1": row(19.0, 0.7), "0.4": row(20.5, 0.7)}})
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("restoring poisson: -0.2 dB")
    assert [line.startswith("warning: ") and "poisson" in line for line in said[1:]] == [True, True]
