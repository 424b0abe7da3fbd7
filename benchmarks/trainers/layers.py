"""Layers that every trainer uses, from `training.networks`, which needs torch and pydantic alone."""

from __future__ import annotations

from pydantic import TypeAdapter
from torch import nn

from benchmarks.trainers.job import SHAPE, Job
from training.networks import Architecture


def layers(job: Job) -> tuple[nn.Module, nn.Module]:
    """Encoder (x -> mean, log_var) and decoder (z -> logits), with fresh weights."""
    network: Architecture = TypeAdapter(Architecture).validate_python(job.network)
    return network.encoder(SHAPE, job.latent_dim), network.decoder(job.latent_dim, SHAPE)
