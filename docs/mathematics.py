"""Draws the figure of docs/mathematics.md, for a model whose evidence can be integrated: python docs/mathematics.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from training.distributions.likelihoods.bernoulli import Bernoulli
from training.distributions.priors.standard_normal import StandardNormal
from training.models.vae import VAE
from training.objectives.elbo import importance_log_likelihood, monte_carlo_elbo

PICTURE = Path(__file__).parent / "pictures" / "bounds.png"
X = torch.tensor([1.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2)
"""The image."""
STEP = 12.0 / 4_000
GRID = torch.linspace(-6.0, 6.0, 4_001).view(-1, 1, 1)
"""Latents, for integrals."""
STEPS = 1_500
SETS = 1_000
"""Sets of draws for each standard deviation and bound."""
HARDLY = 0.03
"""Scale of the logits of a decoder at the start of training."""
DRAWS = (1, 2, 4, 8, 16, 32, 64)
MANY = (1, 4, 16, 64, 256, 1024, 4096)


class Encoder(nn.Module):
    """q(z|x) of the one image: its mean and log variance are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_var = nn.Parameter(torch.ones(1, 1)), nn.Parameter(-torch.ones(1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (n, 1)."""
        return self.mean.expand(len(x), 1), self.log_var.expand(len(x), 1)


class Decoder(nn.Module):
    """Logits of four pixels, `scale` times a curved function of one latent."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, z: Tensor) -> Tensor:
        """Latents (n, 1) -> (n, 1, 2, 2)."""
        logits = torch.cat([8.0 * z, 6.0 - 6.0 * z.square(), 1.0 - z, 1.5 * z + 0.5], 1)
        return self.scale * logits.view(-1, 1, 2, 2)


class Exact(NamedTuple):
    """Integrals over the grid, in nats where they are logarithms."""

    log_evidence: float
    posterior: Tensor
    """p(z|x) on the grid."""
    elbo: float
    gap: float
    """KL(q(z|x) || p(z|x))."""


def main() -> None:
    """Fit q, then draw the three panels."""
    vae = fitted()
    found = exact(vae)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.0, 3.4), layout="constrained")
    with torch.no_grad():
        z, q = GRID.flatten(), vae.posterior(X).log_prob(GRID).exp().flatten()
        left.plot(z, found.posterior, label="posterior p(z|x)")
        left.plot(z, q, "--", label="q(z|x) at the highest bound")
        left.set(xlim=(-1.0, 2.5), ylim=(0.0, 2.2), xlabel="z", title=f"gap: {found.gap:.3f} nats")
        left.legend(loc="upper left", fontsize=8)
        middle.axhline(found.log_evidence, color="black", label="log p(x)")
        middle.axhline(found.elbo, color="tab:orange", linestyle="--", label="ELBO")
        middle.plot(MANY, [importance_weighted(vae, draws) for draws in MANY], "o-", label="importance-weighted")
        middle.set(xscale="log", xlabel="draws K", ylabel="nats", title="bounds on the log evidence")
        middle.legend(loc="lower right", bbox_to_anchor=(1.0, 0.12), fontsize=8)
        for colour, name, spread in (
            ("tab:blue", "highest bound", spreads(vae)),
            ("tab:orange", "decoder that hardly uses z", spreads(model(HARDLY))),
        ):
            for estimator, style, values in zip("AB", ("o-", "s--"), zip(*spread, strict=True), strict=True):
                right.plot(DRAWS, values, style, color=colour, markersize=4, label=f"{estimator}, {name}")
        right.set(xscale="log", yscale="log", ylim=(1e-3, 20.0), xlabel="draws L", ylabel="nats")
        right.set_title("standard deviation of an estimate", fontsize=11)
        right.legend(fontsize=8, loc="upper right")
    figure.savefig(PICTURE, dpi=80)


def model(scale: float = 1.0) -> VAE:
    """The VAE before q is fitted."""
    return VAE(Encoder(), Decoder(scale), Bernoulli((1, 2, 2)), StandardNormal(1))


def fitted() -> VAE:
    """The VAE with the q(z|x) of the highest bound, found by gradients."""
    vae, generator = model(), torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(vae.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        optimiser.zero_grad()
        (-vae.bound(X, vae.noise(64, 1, generator)).elbo.mean()).backward()
        optimiser.step()
        schedule.step()
    return vae


@torch.no_grad()
def exact(vae: VAE) -> Exact:
    """Evidence, posterior, bound and gap, each as an integral of its own."""
    log_joint = vae.log_joint(X, GRID).flatten().double()
    log_evidence = float(torch.logsumexp(log_joint, 0)) + math.log(STEP)
    log_q = vae.posterior(X).log_prob(GRID).flatten().double()
    elbo = float((log_q.exp() * (log_joint - log_q)).sum()) * STEP
    gap = float((log_q.exp() * (log_q - (log_joint - log_evidence))).sum()) * STEP
    return Exact(log_evidence, (log_joint - log_evidence).exp(), elbo, gap)


@torch.no_grad()
def importance_weighted(vae: VAE, draws: int) -> float:
    """Mean of the importance-weighted bound, in nats."""
    eps = vae.noise(draws, SETS, torch.Generator().manual_seed(2))
    return float(importance_log_likelihood(vae, X.expand(SETS, -1, -1, -1), eps).mean())


@torch.no_grad()
def spreads(vae: VAE) -> list[tuple[float, float]]:
    """Standard deviations of the estimators A and B for each number of draws, in nats."""
    x, found = X.expand(SETS, -1, -1, -1), []
    for draws in DRAWS:
        eps = vae.noise(draws, SETS, torch.Generator().manual_seed(3))
        found.append((float(monte_carlo_elbo(vae, x, eps).elbo.std()), float(vae.bound(x, eps).elbo.std())))
    return found


if __name__ == "__main__":
    main()
