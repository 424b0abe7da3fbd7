"""What requests take in memory, by estimates, so that too much is refused before it is there and nothing is killed."""

from __future__ import annotations

import math
import threading
from typing import Any

from service.errors import Overloaded, TooLarge
from service.runtime.model import Model

NUMBER_BYTES = 16
"""Of an answer, as array and as text."""
RETRY_S = 1.0


class Memory:
    """Bytes that all requests under way may take together; they are taken in the event loop and in threads."""

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0
        self.lock = threading.Lock()


class Share:
    """One request's part of the memory: its body, what reading it takes, and what its answer needs.

    Returned when everybody who holds it has let go: the request, and a thread that still reads its body.
    """

    __slots__ = ("_answer", "_body", "_holders", "_memory", "_reading")

    def __init__(self, memory: Memory) -> None:
        self._memory, self._body, self._reading, self._answer, self._holders = memory, 0, 0, 0, 1

    def grow(self, size: int) -> None:
        """Take `size` bytes for a further piece of the body.

        Raises:
            TooLarge: The request needs more than there is.
            Overloaded: Other requests leave too little.
        """
        self._take(size)
        self._body += size

    def reserve(self, size: int) -> None:
        """Take `size` bytes for reading the body, on top of earlier ones.

        Raises:
            TooLarge: The request needs more than there is.
            Overloaded: Other requests leave too little.
        """
        self._take(size)
        self._reading += size

    def keep(self, size: int) -> None:
        """Return what reading took but for `size` bytes, those of the rows that were read."""
        surplus = self._reading - size
        if surplus > 0:
            self._reading = size
            self._take(-surplus)

    def need(self, size: int) -> None:
        """Take what the answer needs at once, in bytes; what it was said to need before is part of it.

        Raises:
            TooLarge: The request needs more than there is.
            Overloaded: Other requests leave too little.
        """
        if size > self._answer:
            self._take(size - self._answer)
            self._answer = size

    def hold(self) -> None:
        """Keep the memory taken until one more `give_back`."""
        self._holders += 1

    def give_back(self) -> None:
        """Let go of it; the last one to do so returns it."""
        self._holders -= 1
        if not self._holders:
            with self._memory.lock:
                self._memory.taken -= self._body + self._reading + self._answer

    def _take(self, size: int) -> None:
        memory, whole = self._memory, self._body + self._reading + self._answer + size
        if whole > memory.limit:
            raise TooLarge(
                f"the request needs about {whole} bytes of memory and VAE_MEMORY_BYTES is {memory.limit}; send fewer "
                "rows or draws or a smaller picture, or accept a binary form, whose many rows come in parts"
            )
        with memory.lock:
            left = memory.limit - memory.taken
            if size <= left:
                memory.taken += size
                return
        raise Overloaded(
            f"requests under way leave {left} bytes of VAE_MEMORY_BYTES ({memory.limit}), and this one needs {size} "
            "more; try again later",
            RETRY_S,
        )


def answer_bytes(model: Model, options: Any, rows: int) -> int:
    """Estimated memory of answering `rows` rows at once, in bytes."""
    image, latent = math.prod(model.input_shape), math.prod(model.latent_shape)
    return NUMBER_BYTES * rows * int(options.memory_numbers(image, latent))
