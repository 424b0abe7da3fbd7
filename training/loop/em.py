"""Monte Carlo EM over a training set: a step is a transition of chains, one an image, and several updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.data import as_float, binarise
from training.errors import DivergedError
from training.inference.mcem import MonteCarloEm, Step
from training.loop.loop import Loop
from training.loop.randomness import keyed_generator
from training.models.vae import VAE


@dataclass(frozen=True)
class EmStage:
    """A VAE whose decoder is trained by Monte Carlo EM; its encoder is never run."""

    module: VAE
    binarised: bool
    """Whether an image is binarised afresh every time it is seen. Its chain then goes on from the last binarisation's
    state, because the two posteriors are similar."""
    steps: int
    """Minibatches, each with one transition of its chains."""
    batch_size: int
    learning_rate: float
    weight_decay: float
    """1/N is the prior N(0, I) on the weights."""
    seed: int
    identity: dict[str, Any]
    """The settings a checkpoint must have been made with."""
    watch: Callable[[VAE], dict[str, float]] = lambda _: {}
    """Further values of the module for the log, after each of `watched_steps`; it must leave the module unchanged."""
    watched_steps: frozenset[int] = frozenset()
    name: str = "mcem"


def train_by_em(stage: EmStage, images: Tensor, folder: Path) -> None:
    """Train to the last step, from the checkpoint in `folder` if there is one.

    Writes `mcem.pt` and appends to `log.jsonl` in `folder`.

    Args:
        stage: What to train.
        images: uint8 (n, c, h, w) on the module's device.
        folder: Of the checkpoint and the log.

    Raises:
        DivergedError, DiskError, CheckpointError, KeyboardInterrupt: As `Loop.complete`.
    """
    _EmLoop(stage, images, folder).complete()


class _EmLoop(Loop):
    stage: EmStage

    def __init__(self, stage: EmStage, images: Tensor, folder: Path) -> None:
        super().__init__(stage, images, folder, stage.batch_size)
        self.steps = stage.steps
        self.em = MonteCarloEm(
            stage.module,
            keyed_generator(images.device, stage.seed, 2),
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
        )
        self.chains = self.em.start(len(images))
        self.since: list[Step] = []
        self.halfway = False

    def learn(self, rows: Tensor) -> None:
        self.em.generator = keyed_generator(self.images.device, self.stage.seed, 1, self.step)
        images = self.images[rows]
        x = binarise(images, self.em.generator) if self.stage.binarised else as_float(images)
        self.halfway = True
        found = self.em.step(x, self.chains[rows])
        if not bool(found.log_joint.isfinite().all()):
            raise DivergedError(
                f"log p(x, z) is no number in step {self.step + 1} of Monte Carlo EM; lower learning_rate "
                f"({self.stage.learning_rate:g}); the last good checkpoint stays in {self.path}"
            )
        self.chains[rows] = found.z
        self.halfway = False
        self.since.append(found)

    @property
    def sound(self) -> bool:
        return super().sound and not self.halfway

    def values(self) -> dict[str, str]:
        log_joint, acceptance = self._means()
        return {"log p(x, z)": f"{log_joint:.2f}", "accepted": f"{acceptance:.2f}"}

    def report(self) -> dict[str, Any]:
        log_joint, acceptance = self._means()
        step_size = self.since[-1].step_size
        self.since.clear()
        return {"log_joint": log_joint, "acceptance": acceptance, "step_size": step_size}

    def _means(self) -> tuple[float, float]:
        """Log p(x, z) in nats and the acceptance since the last report."""
        log_joint = float(torch.stack([step.log_joint.mean() for step in self.since]).mean())
        return log_joint, sum(step.acceptance for step in self.since) / len(self.since)

    def state(self) -> dict[str, Any]:
        return {
            "optimiser": self.em.optimiser.state_dict(),
            "chains": self.chains,
            "step_size": self.em.step_size,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.em.optimiser.load_state_dict(state["optimiser"])
        device = self.images.device
        self.chains, self.em.step_size = state["chains"].to(device), state["step_size"].to(device)
