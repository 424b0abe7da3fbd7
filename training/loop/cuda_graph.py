"""A step recorded as one CUDA graph and launched as a whole: Python launches small kernels slower than they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch

Answer = TypeVar("Answer")
WARM_UP = 3
"""Calls that run as they are before the recording: libraries choose their kernels, gradients and states come to be."""


class Replay(Generic[Answer]):
    """A function without arguments, run as it is for `WARM_UP` calls, then recorded once and replayed.

    What changes from call to call must lie in tensors that the function reads, or in one of `generators`, which may be
    seeded anew between calls; it must never wait for the device. Its answer, like all that it writes, lies in the same
    memory after every call, so copy what is to outlast the next.
    """

    def __init__(self, function: Callable[[], Answer], generators: Iterable[torch.Generator] = ()) -> None:
        self.function, self.calls = function, 0
        # What is recorded on one stream cannot wait for gradients that were made on another.
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)

    def __call__(self) -> Answer:
        """The function's answer."""
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
