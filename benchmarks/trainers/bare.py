"""Minimal trainer of the same network: one loop over the uint8 tensor with the same optimiser.

No moving average, clipping, schedule, log, progress, checkpoint or care for what is no number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.trainers.job import SHAPE, Job, answer
from training.config import Run
from training.data import binarise
from training.distributions.gaussian import DiagonalGaussian
from training.distributions.priors.standard_normal import StandardNormal
from training.loop.optimisers import build
from training.loop.precision import computes_bfloat16
from training.loop.stages import vae_stage
from training.models.vae import VAE


def prepare(job: Job, images: Tensor) -> Callable[[], None]:
    """Prepare a fresh network in the same memory layout."""
    run = Run.model_validate(job.run)
    vae = vae_stage(run, SHAPE, torch.device("cpu")).module
    assert isinstance(vae, VAE)
    return lambda: loop(vae, run, images)


def loop(vae: VAE, run: Run, images: Tensor) -> None:
    """Train, every epoch in a new order."""
    settings, generator = run.train, torch.Generator().manual_seed(run.seed)
    optimisers = build(settings, vae.parameters())
    enabled = settings.precision == "bfloat16" and computes_bfloat16(images.device)
    lower = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(images), generator=generator).split(settings.batch_size):
            x = binarise(images[rows], generator)
            with lower:
                loss = minus_bound(vae, x, generator) / len(rows)
            for optimiser in optimisers:
                optimiser.zero_grad()
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()


def minus_bound(vae: VAE, x: Tensor, generator: torch.Generator) -> Tensor:
    """Sum of -ELBO over the minibatch in nats, written in the plainest way."""
    mean, log_var = (part.float() for part in vae.encoder(x))
    z = mean + torch.exp(0.5 * log_var) * torch.randn(mean.shape, generator=generator)
    logits = vae.decoder(z).float()
    missed = functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    if isinstance(vae.prior, StandardNormal):
        return missed - 0.5 * (1.0 + log_var - mean.square() - log_var.exp()).sum()
    return missed + vae.prior.kl(DiagonalGaussian(mean, log_var), z[None]).sum()


if __name__ == "__main__":
    answer(prepare)
