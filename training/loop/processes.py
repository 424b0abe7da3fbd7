"""Data parallelism over the processes that torchrun starts; one process alone communicates with none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """`rank` of `size` processes that train one model together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process shows progress and writes files."""
        return self.rank == 0

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over all processes as they are computed."""
        return module if self.size == 1 else DistributedDataParallel(module)

    def alone(self, module: nn.Module) -> AbstractContextManager[Any]:
        """A context in which gradients are accumulated without synchronising them."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        return flag if self.size == 1 else bool(self.mean(torch.tensor(float(flag))) > 0)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.size == 1:
            return value
        total = value.to(self._device)
        distributed.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            distributed.barrier()

    @property
    def _device(self) -> str:
        return "cuda" if distributed.get_backend() == "nccl" else "cpu"


ALONE = Processes()


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes named in torchrun's environment: gloo for CPUs, nccl for GPUs, one GPU a process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
