"""The AEVB loop: noise, bound, gradient, step, for each minibatch; by any number of processes.

Source: Kingma and Welling (2013), algorithm 1.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.config import Optimisation
from training.data.crops import Crops
from training.errors import ConfigError, DivergedError
from training.loop.cuda_graph import Replay
from training.loop.loop import LOG_STEPS, Loop
from training.loop.optimisers import build
from training.loop.pictures import Pictures
from training.loop.precision import autocast
from training.loop.processes import ALONE, Processes
from training.loop.randomness import mixed
from training.loop.validation import HeldOut
from training.models.vae import Bound
from training.objectives.elbo import Objective

WARMUP_SHARE, KL_WARMUP_SHARE = 0.1, 0.25
"""Largest shares of a run for `warmup_steps` and `kl_warmup_steps`."""
AVERAGED_STEPS = 8
"""Steps between two updates of the moving average. At every step they would cost 3 % of an MLP's time for no gain."""
MOST_SKIPPED = 10
"""Steps in a row that may be skipped because the bound or its gradient is not finite."""


@dataclass(frozen=True)
class Stage:
    """One thing to train: a module, the bound to raise, and how."""

    name: str
    module: nn.Module
    objective: Objective
    optimisation: Optimisation
    seed: int
    identity: dict[str, Any]
    """The settings a checkpoint must have been made with."""
    watch: Callable[[Any], dict[str, float]] = lambda _: {}
    """Further values of the module for the log, after each of `watched_steps`; it must leave the module unchanged."""
    watched_steps: frozenset[int] = frozenset()
    show: Callable[[Any, Tensor], dict[str, Tensor]] | None = None
    """What the module makes of float images (n, c, h, w) in [0, 1]: blocks of images by caption, for the run's
    `sheet.png`. The same at every call; it must leave the module unchanged."""
    replayable: bool = True
    """Whether the objective keeps everything on the device and reads no value back, so that a GPU can replay it."""
    latent: bool = True
    """Whether the bound has a KL term."""
    lengthening: str = "--epochs"
    """The option or key that makes the stage longer, for messages."""


def train(
    stage: Stage,
    images: Tensor,
    folder: Path,
    processes: Processes = ALONE,
    held_out: Tensor | None = None,
    *,
    crops: Crops | None = None,
    tensorboard: bool = False,
) -> None:
    """Train to the end of the last epoch, from the checkpoint in `folder` if there is one.

    Writes `<stage>.pt` and appends to `log.jsonl` in `folder`. With held-out images it renews the pictures
    `curves.png` and `sheet.png` there every few minutes.

    Args:
        stage: What to train.
        images: uint8 (n, c, h, w) on the module's device.
        folder: Of the checkpoint and the log.
        processes: Those that train together.
        held_out: Images like `images`. The bound on them is measured after every epoch and decides whether the stage
            keeps the moving average of the weights or the last ones; without them it keeps the average.
        crops: Replaces the images in every epoch; None keeps them.
        tensorboard: Whether the log and the sheet are also written for TensorBoard, into `folder`/tensorboard/.

    Raises:
        DependencyError: TensorBoard is asked for and not installed.
        ConfigError: The processes cannot share out a minibatch.
        DataError: A picture whose crops are due cannot be read.
        DivergedError, DiskError, CheckpointError, KeyboardInterrupt: As `Loop.complete`.
    """
    _Loop(stage, images, folder, processes, held_out, crops=crops, tensorboard=tensorboard).complete()


class _Bounded(nn.Module):
    """A stage's bound as a forward pass, which DistributedDataParallel needs to average gradients."""

    def __init__(self, stage: Stage, autocast: torch.autocast) -> None:
        super().__init__()
        self.module, self.objective, self.autocast = stage.module, stage.objective, autocast

    def forward(self, images: Tensor, generator: torch.Generator) -> Bound:
        """(n, c, h, w) -> the bound's terms, (n,) each."""
        with self.autocast:
            return self.objective(self.module, images, generator)


class _Loop(Loop):
    stage: Stage

    def __init__(
        self,
        stage: Stage,
        images: Tensor,
        folder: Path,
        processes: Processes,
        held_out: Tensor | None,
        *,
        crops: Crops | None = None,
        tensorboard: bool = False,
    ) -> None:
        settings = stage.optimisation
        if settings.microbatches % processes.size:
            raise ConfigError(
                f"{processes.size} processes share out {settings.microbatches} microbatches; "
                f"set microbatches in the TOML to a multiple of {processes.size}"
            )
        super().__init__(stage, images, folder, settings.batch_size, processes, crops=crops, tensorboard=tensorboard)
        self.settings = settings
        self.steps = max(settings.epochs, -(-settings.least_steps // self.epoch_steps)) * self.epoch_steps
        self.warmup_steps = min(settings.warmup_steps, int(WARMUP_SHARE * self.steps))
        self.kl_warmup_steps = min(settings.kl_warmup_steps, int(KL_WARMUP_SHARE * self.steps))
        self.held_out = None
        if held_out is not None and processes.first:
            self.held_out = HeldOut(stage, held_out, images, self.batch_size)
            if stage.show is not None:
                self.pictures = Pictures(folder, stage.show, held_out)
        self.kept, self.elbo = "averaged", math.nan
        self.skipped = self.skipped_in_a_row = 0
        self.means = _Means()
        self.weights = [p for p in self.parameters if p.ndim > 1]
        replayed = images.is_cuda and stage.replayable and processes.size == 1
        self.optimisers = build(settings, self.parameters, capturable=replayed)
        self.peaks = [float(group["lr"]) for group in self._groups]
        self.averaged = AveragedModel(stage.module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
        self.averages: list[Tensor] = [p for p in self.averaged.module.parameters() if p.requires_grad]
        self.bounded = processes.parallel(_Bounded(stage, autocast(settings.precision, images.device)))
        self.generators = [torch.Generator(images.device) for _ in range(settings.microbatches)]
        self.rows = torch.empty(self.batch_size, dtype=torch.int64, device=images.device)
        self.kl_weight = torch.ones((), device=images.device)
        self.minibatch, self.advance = self._minibatch, self._advance
        if replayed:
            self.minibatch = Replay(self._minibatch, self.generators)
            steady = settings.schedule == "constant" and self.warmup_steps == 0
            if steady or all(isinstance(group["lr"], Tensor) for group in self._groups):  # a number stays as recorded
                self.advance = Replay(self._advance)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """The optimisers' groups of parameters; a checkpoint puts others in their place."""
        return [group for optimiser in self.optimisers for group in optimiser.param_groups]

    def learn(self, rows: Tensor) -> None:
        bound, norm = self._gradient(rows)
        if self.processes.any(not math.isfinite(norm)):
            self._skip(bound)
        else:
            self._move(norm)
            self.means.add(bound)
        done = self.step + 1
        if done % AVERAGED_STEPS == 0 or done == self.steps:
            self._average(done)

    def _gradient(self, rows: Tensor) -> tuple[Bound, float]:
        """The bound of a minibatch and its gradient's norm; all noise is a function of (seed, step, microbatch)."""
        self.rows.copy_(rows)
        if self.step <= self.kl_warmup_steps:
            self.kl_weight.fill_(min(1.0, (self.step + 1) / max(1, self.kl_warmup_steps)))
        for number, generator in enumerate(self.generators):
            generator.manual_seed(mixed(self.stage.seed, 1, self.step, number))
        terms, norm = self.minibatch()
        return Bound(*terms.clone().unbind()), float(norm)  # a replay writes where the last one did

    def _minibatch(self) -> tuple[Tensor, Tensor]:
        """The gradient of the images `rows`; the bound's terms (2, n), and the norm, no number where the bound is none.

        Every process adds up the gradients of its own microbatches, then takes the mean with the others.
        """
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        parts = list(enumerate(self.rows.tensor_split(self.settings.microbatches)))
        mine = parts[self.processes.rank :: self.processes.size]
        bounds = []
        for number, part in mine[:-1]:
            with self.processes.alone(self.bounded):
                bounds.append(self._add_gradient(number, part))
        bounds.append(self._add_gradient(*mine[-1]))
        if self.settings.weight_prior:  # that of N(0, I) is the weight itself: no need for a graph of squares
            for weight in self.weights:
                if weight.grad is not None:
                    weight.grad.add_(weight.detach(), alpha=1.0 / len(self.images))
        terms = torch.cat(bounds, 1)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return terms, nn.utils.get_total_norm(gradients, foreach=True) + 0.0 * terms.sum()

    def _add_gradient(self, number: int, part: Tensor) -> Tensor:
        torch.default_generator.manual_seed(mixed(self.stage.seed, 15, self.step, number))  # dropout draws from it
        bound: Bound = self.bounded(self.images[part], self.generators[number])
        loss = -(bound.log_likelihood - self.kl_weight * self._freed(bound.kl)).mean()
        (loss * (self.processes.size * len(part) / self.batch_size)).backward()
        return torch.stack(bound).detach()

    def _skip(self, bound: Bound) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise DivergedError(
                f"{MOST_SKIPPED} steps in a row the bound or its gradient was no number (the last bound was "
                f"{bound.elbo.mean():g}) in stage {self.stage.name}, step {self.step + 1}; lower learning_rate "
                f"({self.settings.learning_rate:g}) or gradient_norm; the last good checkpoint stays in {self.path}"
            )

    def _move(self, norm: float) -> None:
        if norm > self.settings.gradient_norm:
            total = torch.tensor(norm, device=self.images.device)
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.gradient_norm, total, foreach=True)
        for group, peak in zip(self._groups, self.peaks, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * self._rate())
            else:
                group["lr"] = peak * self._rate()
        self.advance()
        self.skipped_in_a_row = 0

    def _advance(self) -> None:
        for optimiser in self.optimisers:
            optimiser.step()

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Update the moving average after `step` steps, without the walk of `update_parameters` through both modules.

        That walk costs more than the sums. The decay rises with the steps, so that the average covers about the last
        tenth of a short run, and forgets the first weights.
        """
        if self.averaged.n_averaged == 0:
            self.averaged.update_parameters(self.stage.module)
        else:
            steps = step % AVERAGED_STEPS or AVERAGED_STEPS
            decay = min(self.settings.ema_decay, (1.0 + step) / (10.0 + step))
            torch._foreach_lerp_(self.averages, [*self.parameters], 1.0 - decay**steps)
            self.averaged.n_averaged += 1

    def _rate(self) -> float:
        """The share of the peak learning rate."""
        warmth = min(1.0, (self.step + 1) / max(1, self.warmup_steps))
        done = self.step / self.steps
        if self.settings.schedule == "linear":
            return warmth * min(1.0, (1.0 - done) / self.settings.decay)
        return warmth * (1.0 if self.settings.schedule == "constant" else 0.5 * (1.0 + math.cos(math.pi * done)))

    def _freed(self, kl: Tensor) -> Tensor:
        """Without a gradient where the microbatch's mean is below the free nats.

        Source: Kingma et al. (2016), appendix C.8, with all latents as one group.
        """
        free = self.settings.free_nats
        return torch.where(kl.mean() < free, kl.detach(), kl) if free else kl

    @property
    def average_so_far(self) -> nn.Module:
        """The module with the moving average of the weights, or the module itself before there is one."""
        return self.averaged.module if self.averaged.n_averaged else self.stage.module

    @property
    def exhibit(self) -> nn.Module:
        return self.average_so_far if self.kept == "averaged" else self.stage.module

    def values(self) -> dict[str, str]:
        if not self.means.terms:
            return {}
        log_likelihood, kl = self.means.so_far().tolist()
        shown = {"ELBO": f"{log_likelihood - kl:.2f}", "rec": f"{log_likelihood:.2f}", "KL": f"{kl:.2f}"}
        if self.held_out is not None and self.held_out.best_epoch:
            shown["held out"] = f"{self.held_out.elbo:.2f}"
        return {**shown, **({"skipped": str(self.skipped)} if self.skipped else {})}

    def report(self) -> dict[str, Any]:
        if not self.means.terms:
            return {}
        log_likelihood, kl = self.processes.mean(self.means.take()).tolist()
        self.elbo = float(self.processes.mean(self.means.latest()))
        return {"elbo": log_likelihood - kl, "log_likelihood": log_likelihood, "kl": kl, "skipped": self.skipped}

    def validate(self, epoch: int) -> dict[str, float]:
        if self.held_out is None:
            return {}
        return {"held_out_elbo": self.held_out.after_epoch(self.average_so_far, epoch, self.epochs)}

    def conclude(self) -> None:
        if self.held_out is not None and self.step != self.saved_step:
            self.kept = self.held_out.choose(self.average_so_far, self.stage.module, self.elbo)

    def state(self) -> dict[str, Any]:
        return {
            "kept": self.kept,
            "averaged": self.averaged.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "skipped": self.skipped,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.averaged.load_state_dict(state["averaged"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            # The state alone: how it is stepped is the settings' and the device's affair, not the checkpoint's.
            optimiser.load_state_dict({**optimiser.state_dict(), "state": saved["state"]})
        self.skipped = state["skipped"]
        self.kept = state.get("kept", self.kept)


class _Means:
    """Running means of the bound's terms since they were last taken, and the bound's over the latest steps."""

    def __init__(self) -> None:
        self.terms: list[Bound] = []
        self.steps: deque[Bound] = deque(maxlen=LOG_STEPS)

    def add(self, bound: Bound) -> None:
        self.terms.append(bound)
        self.steps.append(bound)

    def so_far(self) -> Tensor:
        """log_likelihood and kl, (2,)."""
        return torch.stack([torch.cat(terms).mean() for terms in zip(*self.terms, strict=True)])

    def take(self) -> Tensor:
        """The same, and begin anew."""
        found = self.so_far()
        self.terms.clear()
        return found

    def latest(self) -> Tensor:
        """The bound's mean over at most `LOG_STEPS` steps, one number."""
        return torch.cat([bound.elbo for bound in self.steps]).mean()
