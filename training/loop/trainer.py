"""The AEVB loop, flat: minibatch, noise, bound, gradient, step; resumed bit for bit, by any number of processes.

Source: Kingma and Welling (2013), algorithm 1.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from training.config import Optimisation
from training.errors import CheckpointError, ConfigError, DiskError, DivergedError
from training.loop.cuda_graph import Replay
from training.loop.optimisers import build
from training.loop.processes import ALONE, Processes
from training.loop.randomness import mixed, row_order
from training.loop.validation import HeldOut
from training.models.vae import Bound
from training.objectives.elbo import Objective

CHECKPOINT_S = 60.0
LOG_STEPS = 100
SHOWN_S = 0.5
"""Between two values of the bound in the progress bar."""
WARMUP_SHARE, KL_WARMUP_SHARE = 0.1, 0.25
"""Shares of a run that `warmup_steps` and `kl_warmup_steps` never exceed."""
AVERAGED_STEPS = 8
"""Steps between two looks of the moving average, which at every step costs 3 % of an MLP's time and gains nothing."""
MOST_SKIPPED = 10
"""Steps in a row that may be skipped because the bound or its gradient is no number."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Stage:
    """One thing to train: a module, the bound it raises, and how."""

    name: str
    module: nn.Module
    objective: Objective
    optimisation: Optimisation
    seed: int
    identity: dict[str, Any]
    """The settings a checkpoint must have been made with."""
    watch: Callable[[Any], dict[str, float]] = lambda _: {}
    """What the log tells of the module besides, after each of `watched_steps`; it must leave the module as it was."""
    watched_steps: frozenset[int] = frozenset()
    replayable: bool = True
    """Whether the objective leaves all on the device, never asking it for a value, so that a GPU can replay it."""


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself; elsewhere it is emulated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001


def train(
    stage: Stage, images: Tensor, folder: Path, processes: Processes = ALONE, held_out: Tensor | None = None
) -> None:
    """Train to the end of the last epoch, from the checkpoint in `folder` if there is one.

    Writes `<stage>.pt` and appends to `log.jsonl` in `folder`.

    Args:
        stage: What to train.
        images: uint8 (n, c, h, w) on the module's device.
        folder: Of the checkpoint and the log.
        processes: Those that train together.
        held_out: Images like `images` on which the bound is measured after every epoch, and by which the stage keeps
            either the moving average of the weights or the last ones; without them the average.

    Raises:
        DivergedError, DiskError, CheckpointError: As their names say.
        ConfigError: The processes cannot share out a minibatch.
        KeyboardInterrupt: Passes after a checkpoint is written.
    """
    loop = _Loop(stage, images, folder, processes, held_out)
    loop.restore()
    try:
        with deferred_interrupts() as interrupted:
            loop.run(interrupted)
    except DivergedError:
        raise  # what diverged is no good checkpoint
    except BaseException:
        loop.save()
        raise
    loop.save()
    processes.wait()


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM wait for the end of a step, so that a checkpoint never holds half of one."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []
    before = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Bounded(nn.Module):
    """A stage's bound as a forward pass, which is what parallel gradients hang on."""

    def __init__(self, stage: Stage, autocast: torch.autocast) -> None:
        super().__init__()
        self.module, self.objective, self.autocast = stage.module, stage.objective, autocast

    def forward(self, images: Tensor, generator: torch.Generator) -> Bound:
        """(n, c, h, w) -> the bound's terms, (n,) each."""
        with self.autocast:
            return self.objective(self.module, images, generator)


class _Loop:
    def __init__(
        self, stage: Stage, images: Tensor, folder: Path, processes: Processes, held_out: Tensor | None
    ) -> None:
        settings = stage.optimisation
        if settings.microbatches % processes.size:
            raise ConfigError(
                f"{processes.size} processes share out {settings.microbatches} microbatches; "
                f"set microbatches in the TOML to a multiple of {processes.size}"
            )
        self.stage, self.settings, self.images, self.processes = stage, settings, images, processes
        self.path = folder / f"{stage.name}.pt"
        self.log_path = folder / "log.jsonl" if processes.first else Path(os.devnull)
        self.batch_size = min(settings.batch_size, len(images))
        self.epoch_steps = len(images) // self.batch_size
        self.epochs = max(settings.epochs, -(-settings.least_steps // self.epoch_steps))
        self.steps = self.epochs * self.epoch_steps
        self.warmup_steps = min(settings.warmup_steps, int(WARMUP_SHARE * self.steps))
        self.kl_warmup_steps = min(settings.kl_warmup_steps, int(KL_WARMUP_SHARE * self.steps))
        self.held_out = None
        if held_out is not None and processes.first:
            self.held_out = HeldOut(stage, held_out, images, self.batch_size)
        self.kept, self.elbo, self.shown = "averaged", math.nan, 0.0
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.seconds = 0.0
        self.saved_step = self.order_epoch = -1
        self.parameters = [p for p in stage.module.parameters() if p.requires_grad]
        self.weights = [p for p in self.parameters if p.ndim > 1]
        replayed = images.is_cuda and stage.replayable and processes.size == 1
        self.optimisers = build(settings, self.parameters, capturable=replayed)
        self.peaks = [float(group["lr"]) for group in self._groups]
        self.averaged = AveragedModel(stage.module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
        self.averages: list[Tensor] = [p for p in self.averaged.module.parameters() if p.requires_grad]
        lower = settings.precision == "bfloat16" and computes_bfloat16(images.device)
        autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=lower)
        self.bounded = processes.parallel(_Bounded(stage, autocast))
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

    def run(self, interrupted: Callable[[], bool]) -> None:
        progress = tqdm(
            total=self.steps * self.batch_size,
            initial=self.step * self.batch_size,
            desc=f"{self.stage.name} (epoch 0/{self.epochs})",
            unit="image",
            unit_scale=True,
            mininterval=0.5,
            disable=not self.processes.first,
        )
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        means = _Means()
        log = Log(self.log_path)
        with progress, log.file:
            while self.step < self.steps:
                bound, norm = self._gradient()
                if self.processes.any(not math.isfinite(norm)):
                    self._skip(bound)
                else:
                    self._move(norm)
                    means.add(bound)
                self.step += 1
                if self.step % AVERAGED_STEPS == 0 or self.step == self.steps:
                    self._average()
                self.seconds = time.monotonic() - started
                if self.step in self.stage.watched_steps and self.processes.first:
                    log.write({"stage": self.stage.name, "step": self.step, **self.stage.watch(self.stage.module)})
                if self.step < self.steps and self.processes.any(interrupted()):
                    self.save()
                    self.processes.wait()
                    raise KeyboardInterrupt
                self._tell(progress, log, means)
                if self.step < self.steps and time.monotonic() - saved > CHECKPOINT_S:
                    self.save()
                    saved = time.monotonic()
        if self.held_out is not None and self.step != self.saved_step:
            self.kept = self.held_out.choose(self._average_so_far, self.stage.module, self.elbo)
        if self.processes.any(interrupted()):
            raise KeyboardInterrupt

    def _gradient(self) -> tuple[Bound, float]:
        """Of one minibatch: the order of an epoch hangs on (seed, epoch), other noise on (seed, step, microbatch)."""
        epoch, index = divmod(self.step, self.epoch_steps)
        if self.order_epoch != epoch:
            self.order, self.order_epoch = row_order(self.images, self.stage.seed, 0, epoch), epoch
        self.rows.copy_(self.order[index * self.batch_size : (index + 1) * self.batch_size])
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
    def _average(self) -> None:
        """What `update_parameters` does, but for its walk through both modules, which costs more than the sums.

        The decay rises with the steps, so that the average covers about the last tenth of a short run, and forgets
        the first weights.
        """
        if self.averaged.n_averaged == 0:
            self.averaged.update_parameters(self.stage.module)
        else:
            steps = self.step % AVERAGED_STEPS or AVERAGED_STEPS
            decay = min(self.settings.ema_decay, (1.0 + self.step) / (10.0 + self.step))
            torch._foreach_lerp_(self.averages, [*self.parameters], 1.0 - decay**steps)
            self.averaged.n_averaged += 1

    def _rate(self) -> float:
        """The share of the peak learning rate."""
        warmth = min(1.0, (self.step + 1) / max(1, self.warmup_steps))
        constant = self.settings.schedule == "constant"
        return warmth * (1.0 if constant else 0.5 * (1.0 + math.cos(math.pi * self.step / self.steps)))

    def _freed(self, kl: Tensor) -> Tensor:
        """Without a gradient where the microbatch's mean is below the free nats.

        Source: Kingma et al. (2016), appendix C.8, with all latents as one group.
        """
        free = self.settings.free_nats
        return torch.where(kl.mean() < free, kl.detach(), kl) if free else kl

    @property
    def _epoch(self) -> int:
        """That of the next step, from 1."""
        return min(self.step // self.epoch_steps + 1, self.epochs)

    @property
    def _average_so_far(self) -> nn.Module:
        """The module with the moving average of the weights, or as it is before there is one."""
        return self.averaged.module if self.averaged.n_averaged else self.stage.module

    def _tell(self, progress: Any, log: Log, means: _Means) -> None:
        """Whatever is due after a step: the bar, the log's line of training images, that of held-out ones."""
        if time.monotonic() - self.shown > SHOWN_S and means.terms:
            self._show(progress, means.so_far())
            self.shown = time.monotonic()
        progress.update(self.batch_size)
        if (self.step % LOG_STEPS == 0 or self.step == self.steps) and means.terms:
            self._report(log, self.processes.mean(means.take()).tolist())
        if self.held_out is not None and self.step % self.epoch_steps == 0:
            epoch = self.step // self.epoch_steps
            measured = self.held_out.after_epoch(self._average_so_far, epoch, self.epochs)
            log.write({"stage": self.stage.name, "step": self.step, "epoch": epoch, "held_out_elbo": measured})

    def _show(self, progress: Any, terms: Tensor) -> None:
        log_likelihood, kl = terms.tolist()
        progress.set_description(f"{self.stage.name} (epoch {self._epoch}/{self.epochs})", refresh=False)
        shown = {"ELBO": f"{log_likelihood - kl:.2f}", "rec": f"{log_likelihood:.2f}", "KL": f"{kl:.2f}"}
        if self.held_out is not None and self.held_out.best_epoch:
            shown["held out"] = f"{self.held_out.elbo:.2f}"
        progress.set_postfix({**shown, **({"skipped": self.skipped} if self.skipped else {})}, refresh=False)

    def _report(self, log: Log, terms: list[float]) -> None:
        log_likelihood, kl = terms
        self.elbo = log_likelihood - kl
        log.write(
            {
                "stage": self.stage.name,
                "step": self.step,
                "epoch": self._epoch,
                "seconds": round(self.seconds, 2),
                "elbo": log_likelihood - kl,
                "log_likelihood": log_likelihood,
                "kl": kl,
                "skipped": self.skipped,
            }
        )

    def save(self) -> None:
        """Write the whole state; weights that are no longer numbers are not worth it: the last good ones stay."""
        sound = all(bool(p.isfinite().all()) for p in self.parameters)
        if self.step == self.saved_step or not sound or not self.processes.first:
            return
        state = {
            "identity": self.stage.identity,
            "step": self.step,
            "finished": self.step == self.steps,
            "epochs": self.epochs if self.step == self.steps else -(-self.step // self.epoch_steps),
            "kept": self.kept,
            "seconds": self.seconds,
            "module": self.stage.module.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "skipped": self.skipped,
        }
        write_checkpoint(self.path, state)
        self.saved_step = self.step

    def restore(self) -> None:
        """Take up the checkpoint, if there is one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.path.parent, error) from error
        if not self.path.exists():
            return
        # Read into main memory: the module and the optimisers know best what of it belongs on the device.
        state = read_checkpoint(self.path, self.stage.identity, torch.device("cpu"))
        self.step = self.saved_step = state["step"]
        self.seconds = state["seconds"]
        self.stage.module.load_state_dict(state["module"])
        self.averaged.load_state_dict(state["averaged"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            # The state alone: how it is stepped is the settings' and the device's affair, not the checkpoint's.
            optimiser.load_state_dict({**optimiser.state_dict(), "state": saved["state"]})
        self.skipped = state["skipped"]
        self.kept = state.get("kept", self.kept)


class _Means:
    """Running means of the bound's terms since they were last taken."""

    def __init__(self) -> None:
        self.terms: list[Bound] = []

    def add(self, bound: Bound) -> None:
        self.terms.append(bound)

    def so_far(self) -> Tensor:
        """log_likelihood and kl, (2,)."""
        return torch.stack([torch.cat(terms).mean() for terms in zip(*self.terms, strict=True)])

    def take(self) -> Tensor:
        """The same, and begin anew."""
        found = self.so_far()
        self.terms.clear()
        return found


def read_checkpoint(path: Path, identity: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Read a checkpoint that was made with these settings.

    Raises: CheckpointError where it is missing, unreadable or of other settings.
    """
    if not path.exists():
        raise CheckpointError(f"no checkpoint {path}; run `python -m training fit` first")
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises whatever its readers raise
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); delete it to start again") from error
    if not isinstance(state, dict) or "identity" not in state:
        raise CheckpointError(f"{path} is no checkpoint of this trainer; delete it to start again")
    known = _without_epochs(state["identity"], identity)
    if known != identity:
        changed = [key for key in identity if known.get(key) != identity[key]]
        raise CheckpointError(
            f"{path} was made with other settings ({', '.join(changed)}); use --fresh or another --run"
        )
    return state


def _without_epochs(saved: Any, wanted: Any) -> Any:
    """An identity less the numbers of epochs that the wanted one does not have, since a stage may be trained longer."""
    if not (isinstance(saved, dict) and isinstance(wanted, dict)):
        return saved
    return {
        key: _without_epochs(value, wanted.get(key)) for key, value in saved.items() if key != "epochs" or key in wanted
    }


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside the old file, then replace it.

    Raises: DiskError; the old file is then still whole.
    """
    partial = path.with_name(path.name + ".part")
    try:
        torch.save(state, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        raise disk_error(path, error) from error


def stage_seconds(folder: Path) -> dict[str, float]:
    """How long each finished stage in `folder` trained, in seconds."""
    states = {
        path.stem: torch.load(path, map_location="cpu", weights_only=True) for path in sorted(folder.glob("*.pt"))
    }
    return {name: round(state["seconds"], 1) for name, state in states.items() if state.get("finished")}


def trained_epochs(path: Path) -> int | None:
    """The number of epochs that a checkpoint has begun; None where there is none that can be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(state["epochs"])
    except Exception:  # noqa: BLE001  # `read_checkpoint` reports what is wrong
        return None


def read_trained(path: Path, identity: dict[str, Any], module: Module) -> Module:
    """`module` with the weights that a finished stage kept in `path`: their moving average, or the last.

    Raises: CheckpointError as `read_checkpoint` does, and where the stage has not come to its end.
    """
    state = read_checkpoint(path, identity, next(module.parameters()).device)
    if not state["finished"]:
        raise CheckpointError(f"{path} is of an unfinished run; run `python -m training fit` again to resume it")
    weights = state["module"]
    if state.get("kept", "averaged") == "averaged":
        prefix = "module."
        weights = {name.removeprefix(prefix): one for name, one in state["averaged"].items() if name.startswith(prefix)}
    module.load_state_dict(weights)
    return module.eval().requires_grad_(False)


class Log:
    """Lines appended to a file; unbuffered, so that closing it has nothing left to fail on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("ab", buffering=0)
        except OSError as error:
            raise disk_error(path, error) from error

    def write(self, record: dict[str, Any]) -> None:
        """One line."""
        try:
            self.file.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise disk_error(self.path, error) from error


def disk_error(path: Path, error: Exception) -> DiskError:
    """What to say and do where a file of a run cannot be written."""
    return DiskError(f"cannot write {path} ({error}); make room and run the same command again to resume")
