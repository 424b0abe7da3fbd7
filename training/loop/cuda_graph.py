"""Records a step as one CUDA graph: launching small kernels one by one from Python is slower than running them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch

Answer = TypeVar("Answer")
WARM_UP = 3
"""Plain calls before the recording, in which libraries choose kernels and gradients and optimiser state are created."""


class Replay(Generic[Answer]):
    """Runs a function without arguments plainly for `WARM_UP` calls, then records it once and replays it.

    Everything that changes from call to call must be in tensors that the function reads, or in one of `generators`,
    which may be seeded anew between calls. The function must never wait for the device. Its result is in the same
    memory after every call: copy it to keep it.
    """

    def __init__(self, function: Callable[[], Answer], generators: Iterable[torch.Generator] = ()) -> None:
        self.function, self.calls = function, 0
        # A recording on one stream cannot wait for gradients that were made on another.
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)

    def __call__(self) -> Answer:
        """Run the function and return its result."""
        self.calls += 1
        if self.calls <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                answer = self.function()
            torch.cuda.current_stream().wait_stream(self.stream)
            return answer
        if self.calls == WARM_UP + 1:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.answer = self.function()
        self.graph.replay()
        return self.answer
