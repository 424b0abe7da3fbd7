"""The AEVB loop, flat: minibatch, noise, bound, gradient, step; resumed bit for bit.

Source: Kingma and Welling (2013), algorithm 1.
"""

from __future__ import annotations

import json
import math
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
from training.elbo import Bound
from training.errors import CheckpointError, DiskError, DivergedError

CHECKPOINT_S = 60.0
LOG_STEPS = 100

OPTIMISERS: dict[str, Any] = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}

Module = TypeVar("Module", bound=nn.Module)
Objective = Callable[[Any, Tensor, torch.Generator], Bound]
"""(module, uint8 minibatch (n, c, h, w), randomness of this step) -> the bound's two terms, (n,) each."""


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


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """Randomness that is a function of its key alone, so that a resumed run draws what an unbroken one would have."""
    mixed = 0
    for part in key:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return torch.Generator(device).manual_seed(mixed)


def train(stage: Stage, images: Tensor, folder: Path) -> None:
    """Train to the end of the last epoch, from the checkpoint in `folder` if there is one.

    `images` is uint8 (n, c, h, w) on the module's device. Writes `<stage>.pt` and appends to `log.jsonl` in `folder`.
    Raises: DivergedError, DiskError, CheckpointError; KeyboardInterrupt passes after a checkpoint is written.
    """
    loop = _Loop(stage, images, folder)
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


class _Loop:
    def __init__(self, stage: Stage, images: Tensor, folder: Path) -> None:
        settings = stage.optimisation
        self.stage, self.settings, self.images = stage, settings, images
        self.path, self.log_path = folder / f"{stage.name}.pt", folder / "log.jsonl"
        self.batch_size = min(settings.batch_size, len(images))
        self.epoch_steps = len(images) // self.batch_size
        self.steps = settings.epochs * self.epoch_steps
        self.step = 0
        self.seconds = 0.0
        self.saved_step = self.order_epoch = -1
        self.parameters = [p for p in stage.module.parameters() if p.requires_grad]
        self.weights = [p for p in self.parameters if p.ndim > 1]
        # fused: one kernel a step instead of one an operation and parameter.
        self.optimiser = OPTIMISERS[settings.optimiser](self.parameters, lr=settings.learning_rate, fused=True)
        self.averaged = AveragedModel(stage.module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))

    def run(self, interrupted: Callable[[], bool]) -> None:
        progress = tqdm(
            total=self.steps * self.batch_size,
            initial=self.step * self.batch_size,
            desc=f"{self.stage.name} (epoch 0/{self.settings.epochs})",
            unit="image",
            unit_scale=True,
        )
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        means = _Means()
        log = _Log(self.log_path)
        with progress, log.file:
            while self.step < self.steps:
                means.add(self._advance())
                if interrupted():
                    raise KeyboardInterrupt
                self.seconds = time.monotonic() - started
                progress.update(self.batch_size)
                if self.step in self.stage.watched_steps:
                    log.write({"stage": self.stage.name, "step": self.step, **self.stage.watch(self.stage.module)})
                if self.step % LOG_STEPS == 0 or self.step == self.steps:
                    self._report(progress, log, means.take())
                if time.monotonic() - saved > CHECKPOINT_S:
                    self.save()
                    saved = time.monotonic()

    def _advance(self) -> Bound:
        """One minibatch: the order of an epoch hangs on (seed, epoch), all other noise on (seed, step)."""
        epoch, index = divmod(self.step, self.epoch_steps)
        if self.order_epoch != epoch:
            shuffle = keyed_generator(torch.device("cpu"), self.stage.seed, 0, epoch)
            self.order = torch.randperm(len(self.images), generator=shuffle).to(self.images.device)
            self.order_epoch = epoch
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        generator = keyed_generator(self.images.device, self.stage.seed, 1, self.step)
        bound: Bound = self.stage.objective(self.stage.module, self.images[rows], generator)
        loss = -(bound.log_likelihood - self._kl_weight() * self._freed(bound.kl)).mean()
        if self.settings.weight_prior:
            loss = loss + 0.5 * sum(w.square().sum() for w in self.weights) / len(self.images)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_norm, foreach=True)
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate()
        self.optimiser.step()
        self.averaged.update_parameters(self.stage.module)
        self.step += 1
        return Bound(bound.log_likelihood.detach(), bound.kl.detach())

    def _learning_rate(self) -> float:
        warmth = min(1.0, (self.step + 1) / max(1, self.settings.warmup_steps))
        constant = self.settings.schedule == "constant"
        left = 1.0 if constant else 0.5 * (1.0 + math.cos(math.pi * self.step / self.steps))
        return self.settings.learning_rate * warmth * left

    def _freed(self, kl: Tensor) -> Tensor:
        """Without a gradient where the minibatch's mean is below the free nats.

        Source: Kingma et al. (2016), appendix C.8, with all latents as one group.
        """
        return torch.where(kl.mean() < self.settings.free_nats, kl.detach(), kl)

    def _kl_weight(self) -> float:
        return min(1.0, (self.step + 1) / max(1, self.settings.kl_warmup_steps))

    def _report(self, progress: Any, log: Any, record: dict[str, float]) -> None:
        if not math.isfinite(record["elbo"]):
            raise self._diverged(f"the bound became {record['elbo']}")
        epoch = min(self.step // self.epoch_steps + 1, self.settings.epochs)
        progress.set_description(f"{self.stage.name} (epoch {epoch}/{self.settings.epochs})", refresh=False)
        shown = {"ELBO": record["elbo"], "rec": record["log_likelihood"], "KL": record["kl"]}
        progress.set_postfix({key: f"{value:.2f}" for key, value in shown.items()}, refresh=False)
        line = {
            "stage": self.stage.name,
            "step": self.step,
            "epoch": epoch,
            "seconds": round(self.seconds, 2),
            **record,
        }
        log.write(line)

    def save(self) -> None:
        """Write the whole state; weights that are no longer numbers are not worth it: the last good ones stay."""
        if self.step == self.saved_step or not all(bool(p.isfinite().all()) for p in self.parameters):
            return
        state = {
            "identity": self.stage.identity,
            "step": self.step,
            "finished": self.step == self.steps,
            "seconds": self.seconds,
            "module": self.stage.module.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        write_checkpoint(self.path, state)
        self.saved_step = self.step

    def restore(self) -> None:
        """Take up the checkpoint, if there is one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _disk_error(self.path.parent, error) from error
        if not self.path.exists():
            return
        state = read_checkpoint(self.path, self.stage.identity, self.images.device)
        self.step = self.saved_step = state["step"]
        self.seconds = state["seconds"]
        self.stage.module.load_state_dict(state["module"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{what} in stage {self.stage.name} before step {self.step}; lower learning_rate "
            f"({self.settings.learning_rate:g}) or gradient_norm; the last good checkpoint stays in {self.path}"
        )


class _Means:
    """Running means of the bound's terms since they were last taken."""

    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    def add(self, bound: Bound) -> None:
        self.terms.append(torch.stack([bound.log_likelihood.mean(), bound.kl.mean()]))

    def take(self) -> dict[str, float]:
        log_likelihood, kl = torch.stack(self.terms).mean(0).tolist()
        self.terms.clear()
        return {"elbo": log_likelihood - kl, "log_likelihood": log_likelihood, "kl": kl}


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
    if state["identity"] != identity:
        changed = [key for key in identity if state["identity"].get(key) != identity[key]]
        raise CheckpointError(
            f"{path} was made with other settings ({', '.join(changed)}); use --fresh or another --run"
        )
    return state


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
        raise _disk_error(path, error) from error


def stage_seconds(folder: Path) -> dict[str, float]:
    """How long each finished stage in `folder` trained, in seconds."""
    states = {
        path.stem: torch.load(path, map_location="cpu", weights_only=True) for path in sorted(folder.glob("*.pt"))
    }
    return {name: round(state["seconds"], 1) for name, state in states.items() if state.get("finished")}


def read_averaged(path: Path, identity: dict[str, Any], module: Module) -> Module:
    """`module` with the moving average of the weights that a finished stage left in `path`.

    Raises: CheckpointError as `read_checkpoint` does, and where the stage has not come to its end.
    """
    state = read_checkpoint(path, identity, next(module.parameters()).device)
    if not state["finished"]:
        raise CheckpointError(f"{path} is of an unfinished run; run `python -m training fit` again to resume it")
    prefix = "module."
    weights = {key.removeprefix(prefix): value for key, value in state["averaged"].items() if key.startswith(prefix)}
    module.load_state_dict(weights)
    return module.eval().requires_grad_(False)


class _Log:
    """Lines appended to a file; unbuffered, so that closing it has nothing left to fail on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("ab", buffering=0)
        except OSError as error:
            raise _disk_error(path, error) from error

    def write(self, record: dict[str, Any]) -> None:
        """One line."""
        try:
            self.file.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise _disk_error(self.path, error) from error


def _disk_error(path: Path, error: Exception) -> DiskError:
    return DiskError(f"cannot write {path} ({error}); make room and run the same command again to resume")
