"""p(x|z) is a distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.likelihoods.discretised_logistic import DiscretisedLogistic
from training.distributions.likelihoods.gaussian import Gaussian, GaussianWithOutliers

SHAPE = (2, 1, 4)


def binary_images() -> Tensor:
    """All 2^8 images of 2 x 1 x 4 binary pixels."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=8))).unflatten(1, SHAPE)


def logits(seed: int = 0) -> Tensor:
    """One decoder's answer."""
    return 2.0 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_bernoulli_normalises() -> None:
    """The probabilities of all binary images sum to 1."""
    total = Bernoulli(SHAPE).log_prob(logits().expand(256, *SHAPE), binary_images()).double().exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


def test_bernoulli_mean_is_the_expected_image() -> None:
    """E[x|z] is the mean of all binary images, each with its probability."""
    images = binary_images()
    probability = Bernoulli(SHAPE).log_prob(logits().expand(256, *SHAPE), images).exp()
    torch.testing.assert_close(Bernoulli(SHAPE).mean(logits()), (probability[:, None, None, None] * images).sum(0))


def test_grey_level_gives_the_expectation_over_binarisations() -> None:
    """log_prob of a grey image is the mean of log p(b|z) over b ~ Bernoulli(x)."""
    grey = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    images = binary_images()
    chances = torch.where(images > 0.0, grey, 1.0 - grey).flatten(1).prod(1)
    expected = (chances * Bernoulli(SHAPE).log_prob(logits().expand(256, *SHAPE), images)).sum()
    torch.testing.assert_close(Bernoulli(SHAPE).log_prob(logits(), grey), expected)


def test_fair_coins_cost_log_2_a_pixel() -> None:
    """With every logit 0, any image has probability 2^-8."""
    found = Bernoulli(SHAPE).log_prob(torch.zeros(256, *SHAPE), binary_images())
    torch.testing.assert_close(found, torch.full((256,), -8.0 * 0.6931471805599453))


def test_certain_decoder_stays_finite() -> None:
    """A logit of 1,000 costs 0 nats where it is right and 1,000 where it is wrong, never infinity."""
    certain = torch.full((1, 1, 1, 1), 1000.0)
    assert Bernoulli(SHAPE).log_prob(certain, torch.ones(1, 1, 1, 1)).tolist() == [0.0]
    assert Bernoulli(SHAPE).log_prob(certain, torch.zeros(1, 1, 1, 1)).tolist() == [-1000.0]


def test_draws_broadcast_against_images() -> None:
    """(L, n, c, h, w) parameters and (n, c, h, w) images give (L, n)."""
    parameters, x = torch.randn(3, 5, *SHAPE), torch.rand(5, *SHAPE)
    found = Bernoulli(SHAPE).log_prob(parameters, x)
    assert found.shape == (3, 5)
    torch.testing.assert_close(found[1, 2], Bernoulli(SHAPE).log_prob(parameters[1, 2], x[2]))


@pytest.mark.parametrize("log_scale", [-7.0, -5.0, -3.0, -1.0, 1.0])
def test_discretised_logistic_normalises(log_scale: float) -> None:
    """The probabilities of the 256 grey levels sum to 1, for narrow and wide scales, at the edges too."""
    likelihood = DiscretisedLogistic((1, 1, 3))
    nn.init.constant_(likelihood.log_scale, log_scale)
    levels = (torch.arange(256) / 255.0)[:, None, None, None].expand(-1, 1, 1, 3)
    parameters = torch.tensor([-30.0, 0.3, 30.0]).reshape(1, 1, 3)
    each = torch.stack([one_pixel(likelihood, parameters, levels, pixel) for pixel in range(3)]).double()
    torch.testing.assert_close(each.exp().sum(1), torch.ones(3, dtype=torch.float64), atol=2e-4, rtol=0)
    assert bool(each.isfinite().all())


def one_pixel(likelihood: DiscretisedLogistic, parameters: Tensor, levels: Tensor, pixel: int) -> Tensor:
    """log P of every level of one pixel alone, (256,)."""
    one = DiscretisedLogistic((1, 1, 1))
    one.log_scale.data = likelihood.log_scale.data[..., pixel : pixel + 1]
    return one.log_prob(parameters[..., pixel : pixel + 1].expand(256, 1, 1, 1), levels[..., pixel : pixel + 1])


def test_discretised_logistic_gradients_are_finite_far_out() -> None:
    """A level that the model holds to be all but impossible still says where to go."""
    likelihood = DiscretisedLogistic((1, 1, 1))
    nn.init.constant_(likelihood.log_scale, -6.0)
    parameters = torch.tensor([[[[-9.0]]], [[[9.0]]]], requires_grad=True)
    likelihood.log_prob(parameters, torch.tensor([[[[1.0]]], [[[0.0]]]])).sum().backward()
    assert parameters.grad is not None
    assert bool(parameters.grad.isfinite().all())
    assert likelihood.log_scale.grad is not None
    assert bool(likelihood.log_scale.grad.isfinite().all())


def test_gaussian_is_torch_s_with_a_floor() -> None:
    """The density of independent normals; no pixel's standard deviation falls below the floor."""
    likelihood = Gaussian(SHAPE, 0.01)
    nn.init.normal_(likelihood.raw_std)
    x, parameters = torch.rand(5, *SHAPE), torch.randn(3, 5, *SHAPE)
    expected = Normal(torch.sigmoid(parameters), likelihood.std()).log_prob(x).flatten(-3).sum(-1)
    torch.testing.assert_close(likelihood.log_prob(parameters, x), expected)
    nn.init.constant_(likelihood.raw_std, -100.0)
    assert float(likelihood.std().detach().min()) == pytest.approx(0.01)


def test_outliers_are_one_part_of_a_mixture() -> None:
    """Of the Gaussian with the uniform density on [0, 1], in density as in mean; what lies far out costs no more."""
    likelihood = GaussianWithOutliers(SHAPE, 0.01)
    nn.init.normal_(likelihood.outlier_logit)
    x, parameters = torch.rand(5, *SHAPE), torch.randn(3, 5, *SHAPE)
    share = torch.sigmoid(likelihood.outlier_logit)
    gaussian = Normal(torch.sigmoid(parameters), likelihood.std()).log_prob(x).exp()
    expected = (share + (1 - share) * gaussian).log().flatten(-3).sum(-1)
    torch.testing.assert_close(likelihood.log_prob(parameters, x), expected)
    torch.testing.assert_close(likelihood.mean(parameters), 0.5 * share + (1 - share) * torch.sigmoid(parameters))
    nn.init.constant_(likelihood.raw_std, -100.0)
    middle = torch.zeros(100, *SHAPE)
    with torch.no_grad():
        assert float((likelihood.dream(middle, torch.default_generator) - 0.5).abs().max()) < 0.1
        assert float((likelihood.draw(middle, torch.default_generator) - 0.5).abs().max()) > 0.3
    assert float((likelihood.log_prob(parameters, x) - share.log().sum()).detach().min()) >= -1e-3
