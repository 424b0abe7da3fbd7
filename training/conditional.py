"""A run of a conditional model: each variant's stages, then evaluation, calibration and export of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from training.config import ConditionalRun, VariantName
from training.distributions.spoiling import NAMES
from training.errors import ConfigError
from training.evaluation.conditional import (
    calibration_of,
    conditional_figures,
    images_of,
    report_conditional,
    temperature_of,
)
from training.evaluation.evaluate import ALL, Share
from training.evaluation.typical import clean_figures, far_from_training
from training.export.conditional import (
    conditional_about,
    conditional_graphs,
    golden_rows,
    weights_of,
)
from training.export.export import GOLDEN_ROWS, OtherVariant, export, version_folder
from training.loop.checkpoint import stage_seconds
from training.loop.conditional_stages import (
    STAGES,
    Parts,
    Weights,
    as_conditionally_trained,
    build_parts,
    conditional_stage,
    trained_part,
    trained_parts,
)
from training.models.conditional import Temperature
from training.pipeline import AnyWorkshop, clear
from training.progress import tell

SHARED = ("size", "tiles")
"""Keys of a variant's manifest that belong to the whole version."""


class ConditionalWorkshop(AnyWorkshop[ConditionalRun]):
    """A run of a conditional model with its data in memory. Each variant has a folder of its own in that of the run."""

    def clear(self) -> None:
        """Delete what training has written, of all variants."""
        for folder in (self.folder, *map(self._folder, self.run.variants)):
            clear(folder)

    def train(self) -> None:
        """Train all stages of one variant after the other, where they are not finished."""
        for variant in self.run.variants:
            self._train_variant(self.run.of(variant), self._folder(variant))

    def _train_variant(self, run: ConditionalRun, folder: Path) -> None:
        run = as_conditionally_trained(run, folder, longer=True)
        told = "training of the trunk continues, so the latents are trained again from the start"
        self.drop_stale(folder / "trunk.pt", run.trunk.train.epochs, folder / "latents.pt", told)
        parts = build_parts(run, self._weights(run))
        for stage in STAGES:
            tell(f"{run.variants[0]}: {stage}")
            self.train_stage(conditional_stage(run, stage, parts, self.device), folder)
            parts = parts._replace(**{stage: trained_part(run, stage, folder, self.device)})

    def _weights(self, run: ConditionalRun) -> Weights | None:
        """Those to begin with."""
        return None if run.start is None else weights_of(run.start, run.variants[0])

    def parts(self, variant: VariantName) -> Parts:
        """Load the trained networks of a variant, on the CPU."""
        return trained_parts(self.run.of(variant), self._folder(variant), torch.device("cpu"))

    def evaluate(self, share: Share = ALL) -> dict[str, Any]:
        """Figures by variant: decibels of restored test images, and what the latents gain."""
        if share != ALL:
            raise ConfigError("--share is for likelihoods; a conditional model is evaluated as a whole")
        return {variant: self._quality(variant, self.parts(variant).each(self.stored)) for variant in self.run.variants}

    def _quality(self, variant: VariantName, parts: Parts) -> dict[str, Any]:
        figures = conditional_figures(parts, self.images.test[: self.run.test_images], self.run.seed)
        report_conditional(variant, figures)
        return figures

    def export(self, models: Path, *, replace: bool = False, key: Ed25519PrivateKey | None = None) -> Path:
        """Evaluate, calibrate and write all variants as one version, as `AnyWorkshop.export`."""
        version_folder(models, self.run.name, self.run.version, replace=replace)
        every, quality = [], {}
        for variant in self.run.variants:
            exact = self.parts(variant)
            parts = exact.each(self.stored)
            quality[variant] = self._quality(variant, parts)
            tempered = temperature_of(parts, self.images.validation[: self.run.test_images], self.run.seed)
            quality[variant]["temperature"] = tempered
            every.append(self._variant(self.run.of(variant), parts, exact, Temperature(**tempered)))
        first, *others = every
        shared = {
            "size": first.about["size"],
            "tiles": max((one.about["tiles"] for one in every), key=lambda tiles: int(tiles["margin"])),
        }
        about = {
            **first.about,
            **shared,
            "value_range": [0.0, 1.0],
            "likelihood": "gaussian",
            "dataset": self.run.data.dataset,
            "noise_families": list(NAMES),
            "tileable": True,
            "training": self._training(),
            "quality": quality,
        }
        others = [
            OtherVariant(one.graphs, {key: value for key, value in one.about.items() if key not in SHARED})
            for one in others
        ]
        tell("exporting; tracing the graphs and comparing them with torch takes about a minute")
        return export(
            first.graphs, models, self.run.name, self.run.version, about, variants=others, replace=replace, key=key
        )

    def _variant(self, run: ConditionalRun, parts: Parts, exact: Parts, temperature: Temperature) -> OtherVariant:
        spoilt = golden_rows(run, images_of(self.images.test[:GOLDEN_ROWS], parts.channels))
        held_out = self.images.validation[: run.test_images]
        found = {
            "calibration": calibration_of(parts, held_out, run.seed),
            "far_from_training": far_from_training(
                clean_figures, images_of(held_out, parts.channels).numpy(), [], {}, run.seed
            ),
        }
        about = conditional_about(run, parts, spoilt)
        return OtherVariant(conditional_graphs(parts, exact, spoilt, temperature), {**about, **found})

    def _training(self) -> dict[str, Any]:
        seconds: dict[str, float] = {}
        settings: dict[str, Any] = {}
        for variant in self.run.variants:
            folder = self._folder(variant)
            seconds |= {f"{variant} {stage}": time for stage, time in stage_seconds(folder).items()}
            run = as_conditionally_trained(self.run.of(variant), folder)
            settings[variant] = run.model_dump(mode="json", include=set(STAGES), exclude_none=True)
        told = self.run.model_dump(mode="json", include={"seed", "data", "corruptions", "start"}, exclude_none=True)
        return self.told_training({**told, **settings}, seconds)

    def _folder(self, variant: VariantName) -> Path:
        return self.folder / variant
