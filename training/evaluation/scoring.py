"""Modules behind the service's `score`: p(x, z), the gradient of the ELBO, and the ELBO of held-out images."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from service.contract.manifest import Scoring
from training.data import as_float, binarise
from training.distributions.gaussian import DiagonalGaussian
from training.distributions.interface import Support
from training.evaluation.evaluate import is_grey
from training.loop.randomness import keyed_generator
from training.models.vae import VAE, Bound

DRAWS = 16
"""Posterior draws for each image, as the service's `score` uses by default."""
HELD_OUT = 2000
"""Validation images that are scored: enough for an error of one or two percentiles."""
ROWS = 200
"""Rows decoded at once."""


class LogJoint(nn.Module):
    """The log densities of the model: x, z -> log p(x|z) and log p(z), in nats.

    They are computed in double: in float, the last bit of onnxruntime's logarithms and sums depends on the number of
    rows.
    """

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.decoder, self.likelihood = vae.decoder, vae.likelihood
        self.prior = deepcopy(vae.prior.frozen()).double()

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (n, c, h, w) and z (n, d) to log p(x|z) and log p(z) in nats, (n,) each."""
        return self.log_likelihood(x, z).float(), self.prior.log_prob(z.double()).float()

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Compute log p(x|z) in nats, (n,) in double, of x (n, c, h, w) and z (n, d)."""
        return self.likelihood.log_prob(self.decoder(z).double(), x.double())


class ElboGradient(nn.Module):
    """The ELBO at one draw of any diagonal Gaussian q(z), and its gradient in q's parameters."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.joint = LogJoint(vae)

    def forward(self, mean: Tensor, log_var: Tensor, eps: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the ELBO at z = mean + std eps, and its gradients.

        Args:
            mean: (n, d).
            log_var: (n, d).
            eps: Draws of N(0, I), (n, d).
            x: (n, c, h, w).

        Returns:
            The ELBO (n,) in nats, and its gradients in mean and log_var, (n, d) each.
        """
        with torch.enable_grad():
            mean, log_var = (part.detach().requires_grad_() for part in (mean, log_var))
            q = DiagonalGaussian(mean.double(), log_var.double())
            z = q.draw(eps)
            elbo = self.joint.log_likelihood(x, z.float()) - self.joint.prior.kl(q, z[None])
            in_mean, in_log_var = torch.autograd.grad(elbo.sum(), (mean, log_var))
        return elbo.detach().float(), in_mean, in_log_var


def bound_at_draws(vae: VAE, x: Tensor, eps: Tensor) -> Bound:
    """Estimate the ELBO as the service does: the entropy of q in closed form, log p(x|z) and log p(z) by draws.

    Args:
        vae: The VAE.
        x: (n, c, h, w).
        eps: Draws of N(0, I), (L, n, d).

    Returns:
        The bound's terms in nats, (n,) each.

    Source: Kingma and Welling (2013), equation 6, with the entropy in closed form.
    """
    z, q, parameters = vae.infer(vae.posterior(x), eps)
    entropy = q.entropy().expand(len(eps), -1).mean(0)
    return Bound(vae.likelihood.log_prob(parameters, x).mean(0), -entropy - vae.prior.log_prob(z).mean(0))


@torch.inference_mode()
def held_out(vae: VAE, images: Tensor, seed: int, *, dynamic: bool) -> Scoring:
    """Compute percentiles of the ELBO of at most 2,000 held-out images.

    Args:
        vae: The VAE.
        images: uint8 (n, c, h, w), not used in training.
        seed: Seed of the choice, the binarisation and the draws.
        dynamic: Whether training binarised the images. Black and white images count as binarised.

    Returns:
        The manifest's section `scoring`, with percentiles 0 to 100 in nats.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:HELD_OUT]
    images = images[order.to(images.device)]
    generator = keyed_generator(images.device, seed, 6)
    x = binarise(images, generator) if dynamic else as_float(images)
    elbo = [
        bound_at_draws(vae, rows, vae.noise(DRAWS, len(rows), generator)).elbo
        for rows in x.split(max(1, ROWS // DRAWS))
    ]
    percentiles = torch.quantile(torch.cat(elbo).double(), torch.linspace(0.0, 1.0, 101, device=x.device).double())
    binary = vae.likelihood.support is Support.BINARY
    bits = binary and (dynamic or not is_grey(images))
    return Scoring(
        binary=binary,
        binarisation="sample" if bits else "none",
        elbo_percentiles_nats=[round(value, 3) for value in percentiles.tolist()],
        images=len(images),
        draws=DRAWS,
        seed=seed,
    )
