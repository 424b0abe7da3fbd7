"""Wake-sleep: the bound's value, and to each network the gradient that is its own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.config import Optimisation
from training.data import Digits, binarise
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.likelihoods.discretised_logistic import DiscretisedLogistic
from training.distributions.likelihoods.gaussian import Gaussian, GaussianWithOutliers
from training.distributions.priors.realnvp import RealNvp
from training.distributions.priors.standard_normal import StandardNormal
from training.distributions.priors.vamp import Vamp
from training.loop.trainer import Stage, train
from training.models.vae import VAE, Bound
from training.networks.mlp import Mlp
from training.objectives.wake_sleep import wake_sleep

SHAPE = (1, 2, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_vae() -> VAE:
    torch.manual_seed(1)
    mlp = Mlp(architecture="mlp", hidden=(4,))
    vae = VAE(mlp.encoder(SHAPE, 2), mlp.decoder(2, SHAPE), Bernoulli(SHAPE), StandardNormal(2))
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return vae


@pytest.fixture
def vae() -> VAE:
    """Six binary pixels, two latents, weights that are not small."""
    return small_vae()


@pytest.fixture
def x() -> Tensor:
    """Five images."""
    return torch.randint(2, (5, *SHAPE), generator=generator(2)).float()


@pytest.fixture
def eps() -> Tensor:
    """Three draws an image."""
    return torch.randn(3, 5, 2, generator=generator(3))


def gradients(value: Tensor, vae: VAE) -> dict[str, Tensor]:
    vae.zero_grad()
    value.mean().backward()
    return {name: p.grad.clone() for name, p in vae.named_parameters() if p.grad is not None}


def wake_by_hand(vae: VAE, x: Tensor, eps: Tensor) -> dict[str, Tensor]:
    """Of mean log p(x|z) by the decoder's two layers, z a constant: backpropagation written out."""
    (first, _, last), posterior = list(vae.decoder)[:3], vae.posterior(x)  # type: ignore[arg-type]
    z = posterior.draw(eps).detach().flatten(0, 1)
    hidden = torch.tanh(z @ first.weight.T + first.bias)
    by_logit = (x.flatten(1).repeat(len(eps), 1) - torch.sigmoid(hidden @ last.weight.T + last.bias)) / len(z)
    by_hidden = by_logit @ last.weight * (1.0 - hidden.square())
    return {
        "decoder.0.weight": by_hidden.T @ z,
        "decoder.0.bias": by_hidden.sum(0),
        "decoder.2.weight": by_logit.T @ hidden,
        "decoder.2.bias": by_logit.sum(0),
    }


def sleep_by_hand(vae: VAE, z: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Of mean log q(z|x) by the encoder's layers for given dreams: backpropagation written out."""
    first, images = vae.encoder.body[1], x.flatten(1)  # type: ignore[index]
    hidden = torch.tanh(images @ first.weight.T + first.bias)
    mean, log_var = vae.encoder(x)
    by_mean = (z - mean) / log_var.exp() / len(z)
    by_log_var = 0.5 * ((z - mean).square() / log_var.exp() - 1.0) / len(z)
    by_hidden = (by_mean @ vae.encoder.mean.weight + by_log_var @ vae.encoder.log_var.weight) * (1.0 - hidden.square())  # type: ignore[union-attr,operator]
    return {
        "encoder.body.1.weight": by_hidden.T @ images,
        "encoder.body.1.bias": by_hidden.sum(0),
        "encoder.mean.weight": by_mean.T @ hidden,
        "encoder.mean.bias": by_mean.sum(0),
        "encoder.log_var.weight": by_log_var.T @ hidden,
        "encoder.log_var.bias": by_log_var.sum(0),
    }


def test_value_is_the_bound_s(vae: VAE, x: Tensor, eps: Tensor) -> None:
    """Both terms, one figure an image."""
    found, expected = wake_sleep(vae, x, eps, generator()), vae.bound(x, eps)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)
    torch.testing.assert_close(found.kl, expected.kl)


def test_gradients_are_those_computed_by_hand(vae: VAE, x: Tensor, eps: Tensor) -> None:
    """The decoder's is the wake phase's, the encoder's the sleep phase's, and neither has anything of the other."""
    found = gradients(wake_sleep(vae, x, eps, generator(4)).elbo, vae)
    same = generator(4)
    z = torch.randn(5, 2, generator=same)
    shown = torch.bernoulli(torch.sigmoid(vae.decode(z)).detach(), generator=same)
    expected = wake_by_hand(vae, x, eps) | sleep_by_hand(vae, z, shown)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient.detach(), msg=lambda text, name=name: f"{name}: {text}")


def test_neither_phase_reaches_the_other_network(vae: VAE, x: Tensor, eps: Tensor) -> None:
    """The decoder's gradient does not change with the dreams, the encoder's not with the data: bit for bit."""
    here = gradients(wake_sleep(vae, x, eps, generator(5)).elbo, vae)
    other_dreams = gradients(wake_sleep(vae, x, eps, generator(6)).elbo, vae)
    other_data = gradients(wake_sleep(vae, 1.0 - x, 2.0 * eps, generator(5)).elbo, vae)
    for name, gradient in here.items():
        decoder = name.startswith("decoder")
        assert torch.equal(gradient, other_dreams[name]) is decoder, name
        assert torch.equal(gradient, other_data[name]) is not decoder, name


def test_no_gradient_is_the_kl_s(vae: VAE, x: Tensor, eps: Tensor) -> None:
    """So neither free nats nor a warm-up of the KL can reach the sleep phase."""
    assert not wake_sleep(vae, x, eps, generator()).kl.requires_grad


def test_a_learned_prior_is_trained_awake(x: Tensor, eps: Tensor) -> None:
    """Its gradient is that of log p(z) at the posterior's draws; the recognition model's stays the sleep phase's."""
    vae = small_vae()
    vae.prior = RealNvp(2, 2, 8)
    for parameter in vae.prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    found = gradients(wake_sleep(vae, x, eps, generator(7)).elbo, vae)
    z = vae.posterior(x).draw(eps).detach()
    expected = gradients(vae.prior.log_prob(z).mean(0), vae)
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_a_prior_made_of_the_recognition_model_is_refused(vae: VAE, x: Tensor, eps: Tensor) -> None:
    """The two sets of parameters would not be disjoint."""
    vae.prior = Vamp(2, SHAPE, vae.encoder, 3)
    with pytest.raises(ValueError, match="Vamp"):
        wake_sleep(vae, x, eps, generator())


def test_dreams_are_draws_of_the_likelihood() -> None:
    """Mean and variance, for every likelihood, of 20,000 draws of a pixel."""
    torch.manual_seed(8)
    logits = torch.tensor([-1.0, 0.3]).reshape(1, 1, 2)
    many = logits.expand(20_000, 1, 1, 2)
    logistic, alone = DiscretisedLogistic((1, 1, 2)), DiscretisedLogistic((1, 1, 1))
    levels = torch.linspace(0, 1, 256)
    each = [alone.log_prob(logits[..., i : i + 1], levels[:, None, None, None]) for i in range(2)]
    weights, levels = torch.stack(each, -1).exp(), levels[:, None]
    mean = torch.sigmoid(logits).flatten()
    level_mean = (weights * levels).sum(0)
    gaussian, mixed = Gaussian((1, 1, 2), 1 / 256), GaussianWithOutliers((1, 1, 2), 1 / 256)
    mixed_mean = 0.5 * mean + 0.25
    second_moment = 0.5 * (gaussian.std().flatten().square() + mean.square()) + 0.5 / 3
    cases = [
        (Bernoulli((1, 1, 2)), mean, mean * (1 - mean)),
        (gaussian, mean, gaussian.std().flatten().square()),
        (mixed, mixed_mean, second_moment - mixed_mean.square()),
        (logistic, level_mean, (weights * (levels - level_mean).square()).sum(0)),
    ]
    for likelihood, expected, variance in cases:
        with torch.no_grad():
            drawn = likelihood.draw(many, generator(9)).flatten(1)  # type: ignore[attr-defined]
        torch.testing.assert_close(drawn.mean(0), expected.detach(), atol=0.015, rtol=0)
        torch.testing.assert_close(drawn.var(0), variance.detach(), rtol=0.06, atol=0)
        assert float(drawn.min()) >= 0.0
        assert float(drawn.max()) <= 1.0


def test_it_raises_the_bound_of_digits_in_the_trainer(tmp_path: Path) -> None:
    """A few hundred steps of the unchanged trainer; it begins near 64 fair coins, which cost 44.4 nats."""
    images = Digits(dataset="digits").load(tmp_path).train
    torch.manual_seed(0)
    mlp = Mlp(architecture="mlp", hidden=(64,))
    vae = VAE(mlp.encoder((1, 8, 8), 3), mlp.decoder(3, (1, 8, 8)), Bernoulli((1, 8, 8)), StandardNormal(3))

    def objective(model: VAE, images: Tensor, randomness: torch.Generator) -> Bound:
        eps = torch.randn(1, len(images), 3, generator=randomness)
        return wake_sleep(model, binarise(images, randomness), eps, randomness)

    settings = Optimisation(epochs=40, learning_rate=3e-3)
    train(Stage("vae", vae, objective, settings, 0, {}), images, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    values = [line["elbo"] for line in log]
    assert values[0] > -64 * math.log(2.0)
    assert values[-1] > max(values[0] + 5.0, -31.0)
