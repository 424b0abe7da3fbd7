"""What images are scored by: gradients that are slopes, a graph that holds them, percentiles of what was held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from service.contract.graphs import GRAPHS
from training.distributions.interface import Likelihood, Prior
from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.likelihoods.discretised_logistic import DiscretisedLogistic
from training.distributions.likelihoods.gaussian import GaussianWithOutliers
from training.distributions.priors.realnvp import RealNvp
from training.distributions.priors.standard_normal import StandardNormal
from training.distributions.priors.vamp import Vamp
from training.evaluation.scoring import DRAWS, HELD_OUT, ElboGradient, LogJoint, bound_at_draws, held_out
from training.export.export import Exportable, to_onnx
from training.models.vae import VAE
from training.networks.mlp import Mlp
from training.objectives.elbo import importance_log_likelihood

if TYPE_CHECKING:
    from tests.training.conftest import LinearGaussian

SHAPE, D = (1, 3, 2), 3


def tiny(likelihood: Likelihood, prior: str = "standard_normal") -> VAE:
    """A model of no meaning, whose parameters are all away from where they start."""
    torch.manual_seed(1)
    mlp = Mlp(architecture="mlp", hidden=(8,), activation="silu")
    encoder = mlp.encoder(SHAPE, D)
    priors: dict[str, Prior] = {
        "standard_normal": StandardNormal(D),
        "realnvp": RealNvp(D, 2, 8),
        "vamp": Vamp(D, SHAPE, encoder, 5),
    }
    vae = VAE(encoder, mlp.decoder(D, SHAPE), likelihood, priors[prior])
    for parameter in vae.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return vae.eval().requires_grad_(requires_grad=False)


LIKELIHOODS = {
    "bernoulli": Bernoulli(SHAPE),
    "gaussian": GaussianWithOutliers(SHAPE, 1 / 256),
    "discretised_logistic": DiscretisedLogistic(SHAPE),
}
MODELS = [
    ("bernoulli", "standard_normal"),
    ("bernoulli", "vamp"),
    ("gaussian", "realnvp"),
    ("discretised_logistic", "standard_normal"),
]


def given(n: int) -> tuple[Tensor, ...]:
    """mean, log_var, eps and x of n images."""
    generator = torch.Generator().manual_seed(n)
    mean, log_var, eps = torch.randn(3, n, D, generator=generator).unbind(0)
    return mean, log_var - 2.0, eps, torch.rand(n, *SHAPE, generator=generator).round()


@pytest.mark.parametrize(("likelihood", "prior"), MODELS)
def test_gradients_are_the_slopes_of_the_bound(likelihood: str, prior: str) -> None:
    """Central differences in every parameter of q."""
    module = ElboGradient(tiny(LIKELIHOODS[likelihood], prior))
    rows = given(2)
    _, *gradients = module(*rows)
    for which, gradient in enumerate(gradients):
        for k in range(D):
            step, values = 5e-3, []
            for by in (step, -step):
                moved = [part.clone() for part in rows]
                moved[which][:, k] += by
                values.append(module(*moved)[0].double())
            slope = (values[0] - values[1]) / (2 * step)
            torch.testing.assert_close(gradient[:, k].double(), slope, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("likelihood", "prior"), MODELS)
def test_both_graphs_say_the_same_of_a_row_whoever_is_beside_it(likelihood: str, prior: str) -> None:
    """To the bit, at every number of rows up to 40; and what torch says, to 1e-5."""
    vae = tiny(LIKELIHOODS[likelihood], prior)
    mean, log_var, eps, x = given(40)
    for module, rows in ((LogJoint(vae), (x, mean)), (ElboGradient(vae), (mean, log_var, eps, x))):
        gradients = isinstance(module, ElboGradient)
        signature = GRAPHS["elbo_gradient" if gradients else "log_joint"]
        graph = Exportable(module, tuple(row[:4] for row in rows), signature, gradients=gradients)
        session = ort.InferenceSession(to_onnx(module, graph.rows, graph), providers=["CPUExecutionProvider"])

        def run(rows: tuple[Tensor, ...], session: ort.InferenceSession = session) -> list[np.ndarray]:
            names = [entry.name for entry in session.get_inputs()]
            found: list[np.ndarray] = session.run(
                None, {name: row.numpy() for name, row in zip(names, rows, strict=True)}
            )
            return found

        for mine, theirs in zip(module(*rows), run(rows), strict=True):
            np.testing.assert_allclose(theirs, mine.numpy(), rtol=1e-5, atol=1e-5 * max(1.0, float(mine.abs().max())))
        single = [run(tuple(row[k : k + 1] for row in rows)) for k in range(40)]
        for n in range(1, 41):
            for output, together in enumerate(run(tuple(row[:n] for row in rows))):
                assert all(np.array_equal(together[k], single[k][output][0]) for k in range(n))


def test_a_pixel_that_is_all_but_certain_has_a_finite_likelihood() -> None:
    """A logit of -300 or 300, which a sigmoid in double cannot tell from 0 and 1: log p is the logit."""

    class Sure(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return (300.0 * z).reshape(-1, 1, 1, 2)

    vae = VAE(nn.Identity(), Sure(), Bernoulli((1, 1, 2)), StandardNormal(2))
    module, z = LogJoint(vae), torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    x = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2).repeat(2, 1, 1, 1)
    graph = Exportable(module, (x, z), GRAPHS["log_joint"])
    session = ort.InferenceSession(to_onnx(module, (x, z), graph), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x.numpy(), "z": z.numpy()})[0]
    np.testing.assert_allclose(found, [0.0, -600.0], atol=1e-6)


def test_the_bound_at_draws_is_the_trainers(linear_gaussian: LinearGaussian) -> None:
    """Without bias: over many draws it is that with the KL in closed form, and the exact log p(x) of the exact q."""
    x = linear_gaussian.x(20)
    eps = torch.randn(4000, 20, 2, generator=torch.Generator().manual_seed(3))
    for vae in (linear_gaussian.vae(), linear_gaussian.vae(shift=0.2, scale=1.3)):
        torch.testing.assert_close(bound_at_draws(vae, x, eps).elbo, vae.bound(x, eps).elbo, rtol=0, atol=0.15)
    exact = linear_gaussian.log_prob(x).float()
    torch.testing.assert_close(bound_at_draws(linear_gaussian.vae(), x, eps).elbo, exact, rtol=0, atol=0.15)
    torch.testing.assert_close(importance_log_likelihood(linear_gaussian.vae(), x, eps[:5]), exact, rtol=0, atol=1e-3)


def pictures(n: int, levels: int = 256) -> Tensor:
    """uint8 images of that many grey levels, black and white among them."""
    draws = torch.randint(0, levels, (n, *SHAPE), generator=torch.Generator().manual_seed(2))
    return (draws * 255 // (levels - 1)).to(torch.uint8)


def test_percentiles_are_those_of_the_held_out_images(linear_gaussian: LinearGaussian) -> None:
    """Where the ELBO is log p(x) up to the noise of the draws: their distribution is that of the exact values."""
    images = pictures(3000).reshape(-1, 1, 2, 3)
    found = held_out(linear_gaussian.vae(), images, 1, dynamic=False)
    assert (found.images, found.draws, found.seed, found.binary) == (HELD_OUT, DRAWS, 1, False)
    exact = linear_gaussian.log_prob(images.float() / 255.0).double()
    for percent in (25, 50, 75):
        expected = float(torch.quantile(exact, percent / 100))
        assert found.elbo_percentiles_nats[percent] == pytest.approx(expected, abs=0.3)
    assert held_out(linear_gaussian.vae(), images, 1, dynamic=False) == found
    assert held_out(linear_gaussian.vae(), images, 2, dynamic=False) != found


@pytest.mark.parametrize(
    ("levels", "dynamic", "binarisation"), [(256, True, "sample"), (2, False, "sample"), (256, False, "none")]
)
def test_binarisation_is_that_of_training(levels: int, dynamic: bool, binarisation: str) -> None:
    """Bernoulli pixels drawn anew, black and white from the start, or trained on grey levels."""
    found = held_out(tiny(Bernoulli(SHAPE)), pictures(20, levels), 1, dynamic=dynamic)
    assert (found.binary, found.binarisation, found.images) == (True, binarisation, 20)
