"""Monte Carlo EM over a training set, flat: minibatch, transition, updates; resumed bit for bit.

The loop of `training.loop.trainer` takes one step along one gradient; here a step is a transition of chains that the
loop keeps, one an image, and several updates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.data import as_float, binarise
from training.errors import DivergedError
from training.inference.mcem import MonteCarloEm, Step
from training.loop.randomness import keyed_generator, row_order
from training.loop.trainer import (
    CHECKPOINT_S,
    LOG_STEPS,
    Log,
    deferred_interrupts,
    disk_error,
    read_checkpoint,
    write_checkpoint,
)
from training.models.vae import VAE


@dataclass(frozen=True)
class EmStage:
    """A VAE whose encoder is never asked, and how its decoder learns."""

    module: VAE
    binarised: bool
    """Whether an image is binarised afresh every time it is seen. Its chain then goes on from where the last
    binarisation left it: the posteriors of the two are neighbours."""
    steps: int
    """Minibatches to be seen, each with one transition of its chains."""
    batch_size: int
    learning_rate: float
    weight_decay: float
    """1/N is the prior N(0, I) on the weights."""
    seed: int
    identity: dict[str, Any]
    """The settings a checkpoint must have been made with."""
    watch: Callable[[VAE], dict[str, float]] = lambda _: {}
    """What the log tells of the module besides, after each of `watched_steps`; it must leave the module as it was."""
    watched_steps: frozenset[int] = frozenset()


def train_by_em(stage: EmStage, images: Tensor, folder: Path) -> None:
    """Train to the last step, from the checkpoint in `folder` if there is one.

    `images` is uint8 (n, c, h, w) on the module's device. Writes `mcem.pt` and appends to `log.jsonl` in `folder`.
    Raises: DivergedError, DiskError, CheckpointError; KeyboardInterrupt passes after a checkpoint is written.
    """
    loop = _Loop(stage, images, folder)
    loop.restore()
    with deferred_interrupts() as interrupted:
        loop.run(interrupted)


class _Loop:
    def __init__(self, stage: EmStage, images: Tensor, folder: Path) -> None:
        self.stage, self.images = stage, images
        self.path, self.log_path = folder / "mcem.pt", folder / "log.jsonl"
        self.batch_size = min(stage.batch_size, len(images))
        self.epoch_steps = len(images) // self.batch_size
        self.em = MonteCarloEm(
            stage.module,
            keyed_generator(images.device, stage.seed, 2),
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
        )
        self.chains = self.em.start(len(images))
        self.step, self.order_epoch = 0, -1
        self.seconds = 0.0

    def run(self, interrupted: Callable[[], bool]) -> None:
        progress = tqdm(
            total=self.stage.steps * self.batch_size,
            initial=self.step * self.batch_size,
            desc="mcem",
            unit="image",
            unit_scale=True,
        )
        started, saved, since = time.monotonic() - self.seconds, time.monotonic(), list[Step]()
        log = Log(self.log_path)
        with progress, log.file:
            while self.step < self.stage.steps:
                since.append(self._advance())
                self.seconds = time.monotonic() - started
                progress.update(self.batch_size)
                if self.step in self.stage.watched_steps:
                    log.write({"stage": "mcem", "step": self.step, **self.stage.watch(self.stage.module)})
                if self.step % LOG_STEPS == 0 or self.step == self.stage.steps:
                    self._report(progress, log, since)
                    since.clear()
                if interrupted():
                    self.save()
                    raise KeyboardInterrupt
                if self.step == self.stage.steps or time.monotonic() - saved > CHECKPOINT_S:
                    self.save()
                    saved = time.monotonic()

    def _advance(self) -> Step:
        """One minibatch: the order of an epoch hangs on (seed, epoch), all other noise on (seed, step)."""
        epoch, index = divmod(self.step, self.epoch_steps)
        if self.order_epoch != epoch:
            self.order, self.order_epoch = row_order(self.images, self.stage.seed, 0, epoch), epoch
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        self.em.generator = keyed_generator(self.images.device, self.stage.seed, 1, self.step)
        images = self.images[rows]
        x = binarise(images, self.em.generator) if self.stage.binarised else as_float(images)
        found = self.em.step(x, self.chains[rows])
        if not bool(found.log_joint.isfinite().all()):
            raise DivergedError(
                f"log p(x, z) is no number in step {self.step + 1} of Monte Carlo EM; lower learning_rate "
                f"({self.stage.learning_rate:g}); the last good checkpoint stays in {self.path}"
            )
        self.chains[rows] = found.z
        self.step += 1
        return found

    def _report(self, progress: Any, log: Log, since: list[Step]) -> None:
        log_joint = float(torch.stack([step.log_joint.mean() for step in since]).mean())
        acceptance = sum(step.acceptance for step in since) / len(since)
        progress.set_postfix({"log p(x, z)": f"{log_joint:.2f}", "accepted": f"{acceptance:.2f}"}, refresh=False)
        log.write(
            {
                "stage": "mcem",
                "step": self.step,
                "epoch": (self.step - 1) // self.epoch_steps + 1,
                "seconds": round(self.seconds, 2),
                "log_joint": log_joint,
                "acceptance": acceptance,
                "step_size": since[-1].step_size,
            }
        )

    def save(self) -> None:
        """Write the whole state, the chains and their step size too."""
        state = {
            "identity": self.stage.identity,
            "step": self.step,
            "finished": self.step == self.stage.steps,
            "seconds": self.seconds,
            "module": self.stage.module.state_dict(),
            "optimiser": self.em.optimiser.state_dict(),
            "chains": self.chains,
            "step_size": self.em.step_size,
        }
        write_checkpoint(self.path, state)

    def restore(self) -> None:
        """Take up the checkpoint, if there is one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.path.parent, error) from error
        if not self.path.exists():
            return
        state = read_checkpoint(self.path, self.stage.identity, self.images.device)
        self.step, self.seconds = state["step"], state["seconds"]
        self.stage.module.load_state_dict(state["module"])
        self.em.optimiser.load_state_dict(state["optimiser"])
        self.chains, self.em.step_size = state["chains"], state["step_size"]
