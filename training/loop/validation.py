"""The bound on held-out images: measured after every epoch; it decides which weights a stage keeps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.loop.randomness import keyed_generator, row_order
from training.models.vae import Bound
from training.progress import tell, warn

SHARE = 0.1
"""Number of held-out images that are scored, as a share of the training images; at least a minibatch."""
PATIENCE, LEAST_PATIENCE = 0.1, 3
"""A bound that has not risen for this share of the epochs, and at least this number of them, is reported."""
GAP, ERRORS = 0.05, 3.0
"""A bound is reported as worse than another if it is lower by this share and by this many standard errors."""
LEAST_KL = 1.0
"""A KL below this number of nats is reported: the latents then hold almost no information about the image."""


class Score(NamedTuple):
    """The bound and its KL term on several images: means in nats an image, and the bound's standard error."""

    elbo: float
    error: float
    kl: float

    def beats(self, other: Score) -> bool:
        """Whether the other is lower by more than chance and by a relevant amount."""
        return self.elbo - other.elbo > max(GAP * abs(self.elbo), ERRORS * math.hypot(self.error, other.error))


class HeldOut:
    """Held-out images of one stage, and the best bound so far on them."""

    def __init__(self, stage: Any, images: Tensor, train: Tensor, batch_size: int) -> None:
        """Take as many of the held-out `images` as are worth the time.

        Args:
            stage: The `trainer.Stage`.
            images: uint8 (n, c, h, w).
            train: The training images; as many of them are scored at the end.
            batch_size: Of the training.
        """
        self.images = images[: max(batch_size, int(SHARE * len(train)))]
        self.elbo, self.best, self.best_epoch = math.nan, -math.inf, 0
        self._stage, self._train, self._batch_size = stage, train, batch_size
        self._told_epoch = 0

    @torch.no_grad()
    def score(self, module: nn.Module, images: Tensor) -> Score:
        """Estimate the module's bound with the same noise at every call; a bound that is not finite counts as -inf."""
        generator, training = keyed_generator(images.device, self._stage.seed, 13), module.training
        module.eval()  # without dropout
        bounds = [self._stage.objective(module, part, generator) for part in images.split(self._batch_size)]
        module.train(training)
        whole = Bound(*(torch.cat(terms).double() for terms in zip(*bounds, strict=True)))
        if not bool(whole.elbo.isfinite().all()):
            return Score(-math.inf, 0.0, math.nan)
        error = float(whole.elbo.std() / math.sqrt(len(images))) if len(images) > 1 else 0.0
        return Score(float(whole.elbo.mean()), error, float(whole.kl.mean()))

    def after_epoch(self, module: nn.Module, epoch: int, epochs: int) -> float:
        """Measure the bound after an epoch; report once when it has stopped rising."""
        self.elbo = self.score(module, self.images).elbo
        if self.elbo > self.best:
            self.best, self.best_epoch = self.elbo, epoch
        waited = epoch - self.best_epoch
        if waited >= max(LEAST_PATIENCE, PATIENCE * epochs) and self._told_epoch < self.best_epoch:
            self._told_epoch = self.best_epoch
            tell(
                f"{self._stage.name}: the bound on held-out images has not risen since epoch {self.best_epoch} "
                f"({self.best:.2f} nats); if it stays so, lower {self._stage.lengthening} to {self.best_epoch} and add "
                "--fresh"
            )
        return self.elbo

    def choose(self, averaged: nn.Module, last: nn.Module, trained: float) -> str:
        """Choose the better of two modules by their held-out bound, report that bound, and warn of problems.

        Args:
            averaged: With the moving average of the weights.
            last: With the weights of the last step.
            trained: The bound in the last steps of the training, nats an image.

        Returns:
            "averaged" or "last".
        """
        name, modules = self._stage.name, {"averaged": averaged, "last": last}
        scores = {which: self.score(module, self.images) for which, module in modules.items()}
        option = self._stage.lengthening
        kept = max(scores, key=lambda which: scores[which].elbo)
        score = scores[kept]
        rows = row_order(self._train, self._stage.seed, 14)[: len(self.images)]
        seen = self.score(modules[kept], self._train[rows])
        tell(
            f"{name}: bound on {len(self.images)} held-out images {score.elbo:.2f} nats with the {kept} weights, on "
            f"training images {seen.elbo:.2f}, in the last steps {trained:.2f}; KL {score.kl:.2f} nats"
        )
        if Score(trained, seen.error, 0.0).beats(seen):
            warn(f"{name}: the weights that are kept are worse than those of the last steps; raise {option}")
        elif seen.beats(score):
            warn(f"{name}: the model overfits; take more images, fewer epochs or a smaller network")
        if self._stage.latent and score.kl < LEAST_KL:
            warn(f"{name}: the latents say next to nothing of an image (KL below 1 nat); raise {option}")
        return kept
