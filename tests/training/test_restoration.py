"""Corruption with the statistics it is named after, and a fusion that is Bayes' rule where that is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from service.contract.corruption import FAMILIES, operator_of
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.noise import NOISE, Additive, Noise, corrupt, moved, noise_variance, replacement
from training.distributions.priors.standard_normal import StandardNormal
from training.models.restoration import (
    SIGMA_RANGE,
    THROUGH,
    Correction,
    Corrupted,
    Fusion,
    Recognition,
    log_roughness,
    restoration_bound,
    see_through,
    simulate,
)
from training.models.vae import VAE


def seeded(seed: int = 0) -> torch.Generator:
    """Randomness of its own."""
    return torch.Generator().manual_seed(seed)


def levels(sigma: float = 0.0, flip: float = 0.0, masking: float = 0.0, poisson: float = 0.0, n: int = 1) -> Tensor:
    """(n, F), the same level for every image."""
    return torch.tensor([[sigma, flip, masking, poisson]]).expand(n, -1)


GREY = torch.full((4, 1, 250, 250), 0.5)


def within(share: float, p: float, n: int = GREY.numel()) -> bool:
    """Whether a share of n is within four standard errors of p."""
    return abs(share - p) < 4.0 * math.sqrt(p * (1.0 - p) / n) + 1e-6


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
def test_gaussian_noise_has_its_standard_deviation(sigma: float) -> None:
    """The residual has mean 0 and standard deviation sigma, within four standard errors, and is not cut."""
    residual = (corrupt(GREY, levels(sigma, n=4), seeded()) - GREY).double()
    n = GREY.numel()
    assert abs(float(residual.mean())) < 4.0 * sigma / math.sqrt(n)
    assert abs(float(residual.std()) - sigma) < 4.0 * sigma / math.sqrt(2.0 * n)


@pytest.mark.parametrize("flip", [0.1, 0.6])
def test_salt_and_pepper_flips_its_share(flip: float) -> None:
    """A share of the pixels is replaced, by 0 and 1 as often; all others are exactly what they were."""
    y = corrupt(GREY, levels(flip=flip, n=4), seeded())
    assert within(float((y == 0.0).double().mean()), flip / 2.0)
    assert within(float((y == 1.0).double().mean()), flip / 2.0)
    assert set(y.unique().tolist()) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("masking", [0.25, 0.9])
def test_masking_noise_blackens_its_share(masking: float) -> None:
    """A share of the pixels becomes 0; all others are exactly what they were."""
    y = corrupt(GREY, levels(masking=masking, n=4), seeded())
    assert within(float((y == 0.0).double().mean()), masking)
    assert set(y.unique().tolist()) == {0.0, 0.5}


@pytest.mark.parametrize("poisson", [0.1, 0.5])
def test_poisson_noise_counts(poisson: float) -> None:
    """Whole counts of mean x / level^2, so the variance is level^2 x; a black pixel stays black."""
    y = corrupt(GREY, levels(poisson=poisson, n=4), seeded()).double()
    counts = y / poisson**2
    assert float((counts - counts.round()).abs().max()) < 1e-4
    variance, n = 0.5 * poisson**2, GREY.numel()
    assert abs(float(y.mean()) - 0.5) < 4.0 * math.sqrt(variance / n)
    spread = math.sqrt((2.0 + 2.0 * poisson**2) / n)  # of the variance of a Poisson count of mean 1 / (2 level^2)
    assert abs(float(y.var()) / variance - 1.0) < 4.0 * spread
    assert float(corrupt(torch.zeros(1, 1, 9, 9), levels(poisson=poisson), seeded()).max()) == 0.0


def test_families_are_the_contract_s() -> None:
    """One class each, in the order of the level's columns."""
    assert tuple(noise.name for noise in NOISE) == FAMILIES
    assert FAMILIES[0] == "gaussian"


@pytest.mark.parametrize("noise", NOISE, ids=lambda noise: noise.name)
def test_the_likelihood_of_a_family_is_that_of_its_simulation(noise: Noise) -> None:
    """Mean and variance of additive noise, shares of replaced pixels, over 250,000 pixels of one half."""
    level = torch.zeros(1, len(NOISE))
    level[:, noise.column] = 0.3
    y, n = corrupt(GREY, level.expand(4, -1), seeded()).double(), GREY.numel()
    found = replacement(level)
    black, white = (float(sum(terms, torch.zeros(()))) for terms in (found.black, found.white))
    if isinstance(noise, Additive):
        variance = float(noise_variance(level, 0.5))
        assert abs(float(y.mean()) - 0.5) < 4.0 * math.sqrt(variance / n)
        assert float(y.var()) == pytest.approx(variance, rel=0.02)
        assert (black, white, float(found.kept)) == (0.0, 0.0, 1.0)
    else:
        assert float(noise_variance(level, 0.5)) == 0.0
        assert within(float((y == 0.0).double().mean()), black)
        assert within(float((y == 1.0).double().mean()), white)
        assert within(float((y == 0.5).double().mean()), float(found.kept))


def test_replacing_families_act_one_after_the_other() -> None:
    """The probabilities of a pixel under both sum to 1: masking takes its share of the flipped ones too."""
    found = replacement(levels(flip=0.4, masking=0.5))
    black, white = (float(sum(terms, torch.zeros(()))) for terms in (found.black, found.white))
    assert (float(found.kept), black, white) == pytest.approx((0.3, 0.5 + 0.1, 0.1))


def test_a_level_moves_on_a_scale_where_every_number_is_one() -> None:
    """The logarithm of a standard deviation, the logit of a share."""
    found = moved(torch.tensor([[0.2, 0.2, 0.2, 0.2]]), torch.ones(1, 4))
    share = 1.0 / (1.0 + math.exp(-1.0 - math.log(0.2 / 0.8)))
    torch.testing.assert_close(found, torch.tensor([[0.2 * math.e, share, share, 0.2 * math.e]]))


def test_level_zero_is_no_corruption() -> None:
    """With every level 0 the image comes back bit for bit."""
    x = torch.rand(3, 1, 7, 5, generator=seeded())
    assert torch.equal(corrupt(x, levels(n=3), seeded(1)), x)


def test_level_and_clip_are_each_image_s_own() -> None:
    """One image is left alone, the next is noisy, the last is noisy and cut to [0, 1]."""
    x = torch.rand(3, 1, 50, 50, generator=seeded())
    level = torch.cat([levels(), levels(0.5), levels(0.5)])
    clip = torch.tensor([False, False, True]).view(3, 1, 1, 1)
    first, second, third = corrupt(x, level, seeded(1), clip)
    assert torch.equal(first, x[0])
    assert float(second.min()) < 0.0
    assert float(second.max()) > 1.0
    assert (float(third.min()), float(third.max())) == (0.0, 1.0)


def test_simulation_has_the_stated_odds() -> None:
    """Families as often as stated, one an image; levels in range; a third lose pixels, which are 0 in y."""
    n = 20_000
    x = torch.rand(n, 1, 6, 5, generator=seeded())
    whole = simulate(x, seeded(1))
    seen, x = Corrupted(*(part[n // THROUGH :] for part in whole)), x[n // THROUGH :]
    present = seen.level > 0.0
    assert int(present.sum(1).max()) == 1
    for noise, share, column in zip(NOISE, present.double().mean(0).tolist(), seen.level.T, strict=True):
        assert within(share, noise.odds, len(x))
        used = column[column > 0.0]
        assert noise.low * 0.999 <= float(used.min())
        assert float(used.max()) <= noise.high * 1.001
    assert set(seen.mask.unique().tolist()) == {0.0, 1.0}
    assert float(seen.y[seen.mask == 0.0].abs().max()) == 0.0
    lossy = float((seen.mask.flatten(1).min(1).values == 0.0).double().mean())
    assert 0.29 < lossy < 0.34
    untouched = ~present.any(1) & (seen.mask.flatten(1).min(1).values == 1.0)
    torch.testing.assert_close(seen.y[untouched], x[untouched], atol=1e-6, rtol=0.0)


def test_one_in_so_many_is_seen_through_an_operator() -> None:
    """The first are means of blocks, or blurred, under Gaussian noise or none; the mask says how much is seen."""
    kinds = set()
    for seed in range(12):
        seen = simulate(torch.rand(2 * THROUGH, 1, 6, 4, generator=seeded()), seeded(seed))
        through, rest = seen.mask[:2], seen.mask[2:]
        assert float(seen.level[:2, 1:].max()) == 0.0
        assert float(through.max()) < 1.0
        assert set(rest.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(through[0], through[1])
        kinds.add("blocks" if torch.equal(through[0], through[0].flip(1, 2)) and float(through.std()) == 0 else "blur")
    assert kinds == {"blocks", "blur"}


def test_what_is_seen_through_an_operator_is_brought_back() -> None:
    """Means of blocks spread over their blocks, each with a quarter seen of every pixel."""
    x = torch.rand(3, 1, 6, 4, generator=seeded())
    seen = see_through(operator_of(("shrink", 2, 6, 4)), x, levels(n=3), seeded())
    means = functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(seen.y, means)
    torch.testing.assert_close(seen.mask, torch.full_like(x, 0.25))


# Fusion


def fusion(c: float = -1.0, d: float = -6.0, logit: float = -5.0) -> Fusion:
    """Pixel variance exp(c) m (1 - m) + exp(d), weight of anything sigmoid(logit), whatever the level."""
    module = Fusion()
    module.coefficients.data[:3] = torch.tensor([c, d, logit])
    module.extreme_logits.data.fill_(50.0)
    return module.requires_grad_(requires_grad=False)


FUSIONS = [fusion(), fusion(0.5, -2.0, 3.0), fusion(-8.0, -14.0, -20.0)]


def pixels(n: int = 40) -> tuple[Tensor, Tensor]:
    """What the decoder says and what is seen, the ends of the scale among it: (n, 1, 6, 5) each, in [0, 1]."""
    x_mean, y = torch.rand(2, n, 1, 6, 5, generator=seeded(5))
    return x_mean, torch.where(torch.rand(y.shape, generator=seeded(6)) < 0.3, y.round(), y)


ALL_LEVELS = [
    levels(),
    levels(0.02),
    levels(0.6),
    levels(flip=0.3),
    levels(masking=0.5),
    levels(flip=1.0),
    levels(flip=0.3, masking=0.5),
    levels(0.1, flip=0.3),
    levels(poisson=0.3),
]


@pytest.mark.parametrize("module", FUSIONS, ids=["start", "vague", "sure"])
@pytest.mark.parametrize("level", ALL_LEVELS, ids=lambda level: str(level.tolist()))
def test_restored_is_an_image_with_a_variance(level: Tensor, module: Fusion) -> None:
    """Every pixel is in [0, 1], every variance is at least 0; where nothing is seen it is the decoder's pixel."""
    x_mean, y = pixels()
    x_mean[0] = x_mean[0].round()
    mask = (torch.rand(y.shape, generator=seeded(7)) < 0.7).float()
    restored, variance = module(x_mean, y * mask, mask, level.expand(len(y), -1))
    assert float(restored.min()) >= 0.0
    assert float(restored.max()) <= 1.0
    assert float(variance.min()) >= 0.0
    assert bool(variance.isfinite().all())
    assert torch.equal(restored[mask == 0.0], x_mean[mask == 0.0])


@pytest.mark.parametrize("module", FUSIONS, ids=["start", "vague", "sure"])
def test_clean_observation_is_returned(module: Fusion) -> None:
    """As sigma goes to 0 the answer goes to y, whatever the decoder says: at 0 it is y, and nothing is uncertain."""
    x_mean, y = pixels()
    ones = torch.ones_like(y)
    errors = [float((module(x_mean, y, ones, levels(s, n=len(y)))[0] - y).abs().max()) for s in (1e-2, 1e-4, 0.0)]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] < 1e-6
    assert float(module(x_mean, y, ones, levels(n=len(y)))[1].max()) < 1e-6


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_fusion_is_the_gaussian_posterior(sigma: float) -> None:
    """With no weight on `anything` it is conjugate: m + v / (v + s^2) (y - m), variance v s^2 / (v + s^2)."""
    x_mean, y = pixels()
    restored, variance = fusion(-1.0, -6.0, -1000.0)(x_mean, y, torch.ones_like(y), levels(sigma, n=len(y)))
    v = math.exp(-1.0) * x_mean * (1.0 - x_mean) + math.exp(-6.0)
    torch.testing.assert_close(restored, x_mean + v / (v + sigma**2) * (y - x_mean), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(variance, v * sigma**2 / (v + sigma**2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("flip", "masking"), [(0.1, 0.0), (0.6, 0.0), (0.0, 0.5), (0.3, 0.4)])
def test_replaced_pixels_follow_bayes_rule(flip: float, masking: float) -> None:
    """Of a binary image, x ~ Bernoulli(m), the answer is P(x = 1 | y) by enumeration of all that can have happened."""
    m = torch.linspace(0.05, 0.95, 19).view(1, 1, 1, -1)
    level = levels(flip=flip, masking=masking)
    for seen in (0.0, 1.0):

        def chance(x: float, seen: float = seen) -> float:
            """P(y = seen | x): flipped or not, then masked or not."""
            after_flip = {value: (1.0 - flip) * (value == x) + 0.5 * flip for value in (0.0, 1.0)}
            return (1.0 - masking) * after_flip[seen] + masking * (seen == 0.0)

        if max(chance(0.0), chance(1.0)) == 0.0:
            continue
        expected = m * chance(1.0) / (m * chance(1.0) + (1.0 - m) * chance(0.0))
        restored, _ = fusion()(m, torch.full_like(m, seen), torch.ones_like(m), level)
        torch.testing.assert_close(restored, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("level", [levels(flip=0.5), levels(masking=0.5), levels(flip=0.9, masking=0.9)], ids=str)
def test_certain_pixels_are_kept(level: Tensor) -> None:
    """A pixel strictly between 0 and 1 cannot have been replaced: it is kept exactly, and is certain."""
    x_mean, y = torch.rand(2, 10, 1, 6, 5, generator=seeded(8))
    y = y.clamp(0.01, 0.99)
    restored, variance = fusion()(x_mean, y, torch.ones_like(y), level.expand(10, -1))
    torch.testing.assert_close(restored, y)
    assert float(variance.abs().max()) < 1e-6


# The recognition model as a whole


class Constant(nn.Module):
    """A recognition network that always says the same."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros."""
        return torch.zeros(len(x), len(FAMILIES)), torch.zeros(len(x), len(FAMILIES))


class Says(nn.Module):
    """A decoder that always gives the same logits, or a correction that always says the same."""

    def __init__(self, said: Tensor) -> None:
        super().__init__()
        self.said = said

    def forward(self, z: Tensor) -> Tensor:
        """(n, ...) -> (n, c, h, w)."""
        return self.said.expand(len(z), *self.said.shape)


def fitted(logits: Tensor, x: Tensor) -> tuple[Recognition, VAE]:
    """A fusion and a correction of two numbers, fitted on x to a decoder that always says `logits`."""
    vae = VAE(Constant(), Says(logits), Bernoulli(x.shape[1:]), StandardNormal(2))
    said = nn.Parameter(torch.zeros(2, 1, 1))
    recognition = Recognition(Constant(), Constant(), Says(said))
    optimiser = torch.optim.Adam(recognition.parameters(), 0.02)
    eps = torch.zeros(1, len(x), len(FAMILIES))
    for step in range(600):
        sigma = SIGMA_RANGE[0] * (SIGMA_RANGE[1] / SIGMA_RANGE[0]) ** torch.rand(len(x), generator=seeded(step))
        level = functional.pad(sigma[:, None], (0, len(FAMILIES) - 1))
        seen = Corrupted(corrupt(x, level, seeded(1000 + step)), torch.ones_like(x), level)
        optimiser.zero_grad()
        bound = restoration_bound(recognition, vae, x, seen, eps)
        (-(bound.log_likelihood - bound.kl).mean()).backward()
        optimiser.step()
    return recognition.requires_grad_(requires_grad=False), vae


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.5])
def test_fitted_fusion_is_as_good_as_one_can_be(grey: tuple[Recognition, VAE], sigma: float) -> None:
    """Pixels are N(1/2, 0.1^2), the decoder says 1/2: on new images the error is v s^2 / (v + s^2) within 8 %, and so
    is what is said of it within 25 %.
    """  # noqa: D205  # one promise
    v = 0.1**2
    recognition, vae = grey
    new = 0.5 + 0.1 * torch.randn(300, 1, 8, 8, generator=seeded(11))
    level = levels(sigma, n=300)
    restored, variance = recognition.restored(
        vae, Corrupted(corrupt(new, level, seeded(12)), torch.ones_like(new), level)
    )
    expected = v * sigma**2 / (v + sigma**2)
    assert float((restored - new).square().mean()) == pytest.approx(expected, rel=0.08)
    assert float(variance.mean()) == pytest.approx(expected, rel=0.25)


@pytest.fixture(scope="module")
def grey() -> tuple[Recognition, VAE]:
    """Fitted to images whose pixels are N(1/2, 0.1^2)."""
    return fitted(torch.zeros(1, 8, 8), 0.5 + 0.1 * torch.randn(100, 1, 8, 8, generator=seeded(10)))


def test_how_often_a_pixel_is_black_or_white_is_learned() -> None:
    """Of pixels that the decoder calls white a third are exactly white; of black ones all are exactly black."""
    x_mean = torch.zeros(1, 8, 8)
    x_mean[:, :4] = 1.0
    x = torch.zeros(200, 1, 8, 8)
    x[:, :, :4] = torch.where(torch.rand(200, 1, 4, 8, generator=seeded(13)) < 1 / 3, 1.0, 0.7)
    module = Fusion()
    optimiser = torch.optim.Adam([module.extreme_logits], 0.1)
    for _ in range(300):
        optimiser.zero_grad()
        (-module.extremes_log_prob(x_mean.expand_as(x), x).mean()).backward()
        optimiser.step()
    black, white = module.extremes.tolist()
    assert black > 0.99
    assert white == pytest.approx(1 / 3, abs=0.02)


def test_a_correction_moves_by_standard_deviations() -> None:
    """What the network says is a shift in the fusion's deviations, above the least, and the logarithm of the variance's
    factor; what is certain stays.
    """  # noqa: D205  # one promise
    said = torch.tensor([0.5, math.log(4.0)]).view(2, 1, 1)
    fused, variance = torch.full((2, 1, 3, 3), 0.25), torch.full((2, 1, 3, 3), 0.04)
    correction = Correction(Says(said.expand(2, 3, 3)))
    restored, wider = correction(fused, variance, fused, torch.ones_like(fused), levels(0.1, n=2))
    torch.testing.assert_close(restored, torch.full_like(fused, 0.25 + 0.5 * 0.199), atol=1e-5, rtol=0.0)
    certain, _ = correction(fused, torch.zeros_like(fused), fused, torch.ones_like(fused), levels(n=2))
    torch.testing.assert_close(certain, fused, atol=1e-6, rtol=0.0)
    torch.testing.assert_close(wider, torch.full_like(fused, 0.16), atol=1e-5, rtol=0.0)


def test_recognition_sees_observation_mask_and_level() -> None:
    """The network is given y, mask and a constant plane a level; the level's network y and mask alone."""

    class Summing(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            planes = x.mean((2, 3))
            return planes, torch.zeros_like(planes)

    seen = Corrupted(torch.full((2, 1, 4, 3), 0.25), torch.ones(2, 1, 4, 3), torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2))

    class Twice(Summing):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mean, log_var = super().forward(x)
            return mean.repeat(1, 2), log_var.repeat(1, 2)

    recognition = Recognition(Summing(), Twice(), Summing())
    torch.testing.assert_close(recognition.posterior(seen).mean[1], torch.tensor([0.25, 1.0, 0.1, 0.2, 0.3, 0.4]))
    rough = float(log_roughness(seen.y, seen.mask)[0])
    expected = torch.tensor([0.25 + rough, 1.0, 0.25, 1.0 + rough])
    torch.testing.assert_close(recognition.log_level(seen.y, seen.mask).mean[0], expected)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
def test_roughness_is_the_level_of_noise_on_a_plane(sigma: float) -> None:
    """The Laplacian does not see the plane; where no pixel has all its neighbours, nothing is known."""
    generator = torch.Generator().manual_seed(2)
    plane = torch.linspace(0.0, 1.0, 64).expand(2, 3, 64, 64)
    y = plane + sigma * torch.randn(2, 3, 64, 64, generator=generator)
    mask = torch.ones_like(y)
    mask[1] = torch.arange(64) % 2
    found = log_roughness(y, mask).exp()
    assert float(found[0]) == pytest.approx(sigma, rel=0.03)
    assert float(found[1]) == pytest.approx(math.sqrt(0.015 * 0.8))


@pytest.mark.parametrize("coefficient", [-1e3, 1e3])
def test_fusion_is_finite_wherever_training_ends(coefficient: float) -> None:
    """Whatever the fit of an untrained model gives, and however sure its decoder is, the answer is a number."""
    fusion = Fusion().requires_grad_(False)
    fusion.coefficients.fill_(coefficient)
    x_mean = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3).expand(4, 1, 1, 3)
    y = torch.tensor([-0.3, 0.4, 1.7]).view(1, 1, 1, 3).expand(4, 1, 1, 3)
    level = torch.cat([levels(0.02), levels(0.7), levels(flip=0.3), levels(poisson=0.2)])
    restored, variance = fusion(x_mean, y, torch.ones_like(y), level)
    assert restored.isfinite().all()
    assert variance.isfinite().all()
    assert (variance >= 0).all()
