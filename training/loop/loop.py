"""What every training loop repeats: minibatches in a seeded order, log, progress bar, checkpoints, resume."""

from __future__ import annotations

import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.data.crops import Crops
from training.errors import DivergedError
from training.loop.checkpoint import disk_error, read_checkpoint, write_checkpoint
from training.loop.log import Log
from training.loop.pictures import Pictures
from training.loop.processes import ALONE, Processes
from training.loop.randomness import row_order

CHECKPOINT_S = 60.0
"""Between two checkpoints."""
LOG_STEPS, LOG_S = 100, 2.0
"""A line of the log is written after every `LOG_STEPS` steps, and when the last one is `LOG_S` old."""
SHOWN_S = 0.5
"""Between two values in the progress bar."""


class AnyStage(Protocol):
    """What every loop needs to know of its stage."""

    @property
    def name(self) -> str:
        """Of the checkpoint's file, and in the log."""

    @property
    def module(self) -> nn.Module:
        """What is trained."""

    @property
    def seed(self) -> int:
        """Of the order of the images and of all noise."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings a checkpoint must have been made with."""

    @property
    def watch(self) -> Callable[[Any], dict[str, float]]:
        """Further values of the module for the log; it must leave the module unchanged."""

    @property
    def watched_steps(self) -> frozenset[int]:
        """The steps after which `watch` is called."""


class Loop(ABC):
    """Steps 0 to `steps` over a training set; resumed from its checkpoint bit for bit.

    The order of an epoch is a function of (seed, epoch); a subclass makes all other noise a function of (seed, step).

    Args:
        stage: What to train.
        images: uint8 (n, c, h, w) on the module's device.
        folder: Folder of the checkpoint and the log.
        batch_size: Images of a minibatch.
        processes: Those that train together.
        crops: Replaces the images in every epoch; None keeps them.
        tensorboard: Whether the log is also written for TensorBoard, into `folder`/tensorboard/.
    """

    pictures: Pictures | None = None
    """The pictures of the run, renewed while it trains; a subclass may set them in the first process."""

    def __init__(
        self,
        stage: AnyStage,
        images: Tensor,
        folder: Path,
        batch_size: int,
        processes: Processes = ALONE,
        *,
        crops: Crops | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.stage, self.images, self.processes = stage, images, processes
        self.crops, self.tensorboard = crops, tensorboard
        self.path = folder / f"{stage.name}.pt"
        self.log_path = folder / "log.jsonl" if processes.first else Path(os.devnull)
        self.batch_size = min(batch_size, len(images))
        self.epoch_steps = len(images) // self.batch_size
        self.steps = self.step = 0
        self.seconds = self.shown = self.logged = 0.0
        self.saved_step = self.order_epoch = -1
        self.parameters = [p for p in stage.module.parameters() if p.requires_grad]

    @abstractmethod
    def learn(self, rows: Tensor) -> None:
        """Take step `self.step` on the images `rows` (n,)."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Values for the log since the last report; empty where there are none."""

    @abstractmethod
    def values(self) -> dict[str, str]:
        """Values for the progress bar; empty where there are none yet."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the weights and the step."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""

    def validate(self, epoch: int) -> dict[str, float]:  # noqa: ARG002  # those of a subclass
        """Values for the log after an epoch; empty by default."""
        return {}

    def conclude(self) -> None:  # noqa: B027  # most loops have nothing to choose
        """Choose what the checkpoint keeps, after the last step."""

    @property
    def exhibit(self) -> nn.Module:
        """The module that the pictures are of."""
        return self.stage.module

    @property
    def sound(self) -> bool:
        """Whether the present state is worth a checkpoint: all weights are finite."""
        return all(bool(p.isfinite().all()) for p in self.parameters)

    @property
    def epochs(self) -> int:
        """Passes over the images, the last perhaps not a whole one."""
        return -(-self.steps // self.epoch_steps)

    @property
    def epoch(self) -> int:
        """That of the next step, from 1."""
        return min(self.step // self.epoch_steps + 1, self.epochs)

    def complete(self) -> None:
        """Run to the last step, from the checkpoint if there is one, and leave a checkpoint.

        Raises:
            DivergedError: The last good checkpoint stays.
            DiskError, CheckpointError: As their names say.
            KeyboardInterrupt: Passes after a checkpoint is written.
        """
        self.restore()
        try:
            with deferred_interrupts() as interrupted:
                self.run(interrupted)
        except DivergedError:
            raise  # a diverged state is no good checkpoint
        except BaseException:
            self.save()
            raise
        finally:
            if self.crops is not None:
                self.crops.close()
        self.save()
        self.processes.wait()

    def run(self, interrupted: Callable[[], bool]) -> None:
        """Take the steps that are left, until `interrupted`."""
        progress = tqdm(
            total=self.steps * self.batch_size,
            initial=self.step * self.batch_size,
            desc=f"{self.stage.name} (epoch 0/{self.epochs})",
            unit="image",
            unit_scale=True,
            mininterval=0.5,
            disable=not self.processes.first,
        )
        started, saved, begun = time.monotonic() - self.seconds, time.monotonic(), self.step
        self.logged = saved
        with progress, closing(self._opened_log()) as log:
            while self.step < self.steps:
                self.learn(self._rows(interrupted))
                self.step += 1
                self.seconds = time.monotonic() - started
                if self.step in self.stage.watched_steps and self.processes.first:
                    log.write({"stage": self.stage.name, "step": self.step, **self.stage.watch(self.stage.module)})
                news = self.processes.any(interrupted() or self._overdue())  # one vote a step, on both
                if news and self.step < self.steps and self.processes.any(interrupted()):
                    self.save()
                    self.processes.wait()
                    self._draw(log)
                    raise KeyboardInterrupt
                self._show(progress)
                self._log(log, overdue=news)
                if self.step < self.steps and time.monotonic() - saved > CHECKPOINT_S:
                    self.save()
                    saved = time.monotonic()
                if self.pictures is not None and self.pictures.due():
                    self._draw(log)
            self.conclude()
            if self.step > begun:
                self._draw(log)
        if self.processes.any(interrupted()):
            raise KeyboardInterrupt

    def _opened_log(self) -> Log:
        board = self.path.parent / "tensorboard" / self.stage.name
        return Log(self.log_path, board if self.tensorboard and self.processes.first else None, self.step)

    def _overdue(self) -> bool:
        return self.processes.first and time.monotonic() - self.logged > LOG_S

    def _draw(self, log: Log) -> None:
        if self.pictures is not None:
            log.show(self.pictures.draw(self.exhibit), self.step)

    def _rows(self, interrupted: Callable[[], bool]) -> Tensor:
        """Those of the next minibatch, (n,)."""
        epoch, index = divmod(self.step, self.epoch_steps)
        if self.order_epoch != epoch:
            if self.crops is not None:
                self.crops.fill(self.images, epoch, ahead=epoch + 1 < self.epochs, interrupted=interrupted)
            self.order, self.order_epoch = row_order(self.images, self.stage.seed, 0, epoch), epoch
        return self.order[index * self.batch_size : (index + 1) * self.batch_size]

    def _show(self, progress: Any) -> None:
        if time.monotonic() - self.shown > SHOWN_S and (values := self.values()):
            progress.set_description(f"{self.stage.name} (epoch {self.epoch}/{self.epochs})", refresh=False)
            progress.set_postfix(values, refresh=False)
            self.shown = time.monotonic()
        progress.update(self.batch_size)

    def _log(self, log: Log, *, overdue: bool) -> None:
        """Write the lines that are due after a step: of the training, and of an epoch that ended."""
        common = {"stage": self.stage.name, "step": self.step}
        if overdue or self.step % LOG_STEPS == 0 or self.step == self.steps:
            self.logged = time.monotonic()
            if found := self.report():
                log.write({**common, "epoch": self.epoch, "seconds": round(self.seconds, 2), **found})
        if self.step % self.epoch_steps == 0:
            epoch = self.step // self.epoch_steps
            if found := self.validate(epoch):
                log.write({**common, "epoch": epoch, **found})

    def save(self) -> None:
        """Write the whole state, unless it is written already, unsound, or another process's to write."""
        if self.step == self.saved_step or not self.sound or not self.processes.first:
            return
        state = {
            "identity": self.stage.identity,
            "step": self.step,
            "finished": self.step == self.steps,
            "epochs": self.epochs if self.step == self.steps else -(-self.step // self.epoch_steps),
            "seconds": self.seconds,
            "module": self.stage.module.state_dict(),
            **self.state(),
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
        self.load(state)


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Make SIGINT and SIGTERM wait for the end of a step, so that a checkpoint never holds half of one."""
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
