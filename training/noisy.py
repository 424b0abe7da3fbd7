"""A run of a model of noisy images: both stages, evaluation and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from training.config import NoisyRun
from training.data import ImageSet, as_float
from training.data.noisy import unpacked
from training.errors import ConfigError
from training.evaluation.evaluate import ALL, Share
from training.export.export import GOLDEN_ROWS, export, golden_images, version_folder
from training.export.noisy import noisy_about, noisy_graphs
from training.loop.checkpoint import stage_seconds
from training.loop.noisy_stages import (
    STAGES,
    NoisyParts,
    as_noisily_trained,
    build_noisy,
    noisy_stage,
    trained_noisy,
)
from training.loop.randomness import keyed_generator
from training.pipeline import AnyWorkshop
from training.progress import tell


class NoisyWorkshop(AnyWorkshop[NoisyRun]):
    """A run of a model of noisy images with its data in memory."""

    @staticmethod
    def read(run: NoisyRun, data: Path) -> ImageSet:
        """Read the images of a run, with the noise that it names or that is found in each image."""
        return run.data.load(data, run.model.likelihood.known())

    def train(self) -> None:
        """Train the network of the mean, then the VAE on its features, where they are not finished."""
        run = as_noisily_trained(self.run, self.folder, longer=True)
        told = "training of the trunk continues, so the VAE is trained again from the start"
        self.drop_stale(self.folder / "trunk.pt", run.trunk.train.epochs, self.folder / "vae.pt", told)
        parts = build_noisy(run, self.images.train)
        for stage in STAGES:
            self.train_stage(noisy_stage(run, stage, parts, self.device), self.folder)
            parts = parts._replace(**{stage: trained_noisy(run, stage, self.folder, self.device)})

    def parts(self) -> NoisyParts:
        """Load the trained networks, on the CPU."""
        return NoisyParts(*(trained_noisy(self.run, stage, self.folder, torch.device("cpu")) for stage in STAGES))

    def evaluate(self, share: Share = ALL) -> dict[str, Any]:
        """The bound on the test crops. Decibels need clean images, which there are none of."""
        if share != ALL:
            raise ConfigError("--share is for likelihoods of many draws; a model of noisy images needs none")
        return self._quality(self.parts().each(self.stored))

    @torch.no_grad()
    def _quality(self, parts: NoisyParts) -> dict[str, Any]:
        stage = noisy_stage(self.run, "vae", parts, torch.device("cpu"))
        images = as_float(self.images.test.cpu())
        bound = stage.objective(parts.vae, images, keyed_generator(images.device, self.run.seed, 13))
        y, noise = unpacked(images)
        t, seen = noise.stabilised(y), parts.trunk.seen(y, torch.ones_like(y), noise)
        left = t - parts.vae.moments_of(t, seen, noise)[0]
        figures = {
            "test_crops": len(images),
            "elbo_nats": round(float(bound.elbo.mean()), 3),
            "log_likelihood_nats": round(float(bound.log_likelihood.mean()), 3),
            "kl_nats": round(float(bound.kl.mean()), 3),
            "removed_std": round(float(left.std()), 4),
        }
        tell(
            f"ELBO {figures['elbo_nats']} nats a crop, KL {figures['kl_nats']}; what the mean removes has the standard "
            f"deviation {figures['removed_std']} in units of the noise"
        )
        return figures

    def export(self, models: Path, *, replace: bool = False, key: Ed25519PrivateKey | None = None) -> Path:
        """Evaluate and write the model version, as `AnyWorkshop.export`."""
        version_folder(models, self.run.name, self.run.version, replace=replace)
        exact = self.parts()
        parts = exact.each(self.stored)
        y = golden_images(unpacked(as_float(self.images.test[:GOLDEN_ROWS].cpu()))[0], self.run.multiple_of)
        about = {
            **noisy_about(self.run, parts, y),
            "value_range": [0.0, 1.0],
            "likelihood": "noise",
            "prior": "standard_normal",
            "dataset": self.run.data.dataset,
            "tileable": True,
            "training": self._training(),
            "quality": self._quality(parts),
        }
        tell("exporting; tracing the graphs and comparing them with torch takes about a minute")
        graphs = noisy_graphs(parts, exact, y)
        return export(graphs, models, self.run.name, self.run.version, about, replace=replace, key=key)

    def _training(self) -> dict[str, Any]:
        run = as_noisily_trained(self.run, self.folder)
        told = run.model_dump(mode="json", exclude={"name", "version", "card", "export"}, exclude_none=True)
        return self.told_training(told, stage_seconds(self.folder))
