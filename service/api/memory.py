"""The memory budget of all requests. It works with estimates, so a request is refused before memory is allocated."""

from __future__ import annotations

import math
import threading
from typing import Any

from service.errors import Overloaded, TooLarge
from service.runtime.model import Model

NUMBER_BYTES = 16
"""Memory of one number of an answer, as array and as text."""
LEVEL_BYTES = {"uint8": 4, "uint16": 6}
"""Memory of one level of an answer: as array, in the picture that is written, in its file, and of what was sent with
its missing pixels set to 0."""
RETRY_S = 1.0


class Memory:
    """Bytes that all requests under way may take together. The lock is needed by the event loop and codec threads.

    Args:
        limit: The budget in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0
        self.lock = threading.Lock()


class Share:
    """One request's share of the memory: its body, the decoding of it, its answer.

    It returns to the budget when the last holder gives it back: the request, or a thread that still decodes its body.
    """

    __slots__ = ("_answer", "_body", "_holders", "_memory", "_reading")

    def __init__(self, memory: Memory) -> None:
        self._memory, self._body, self._reading, self._answer, self._holders = memory, 0, 0, 0, 1

    def grow(self, size: int) -> None:
        """Take `size` bytes for the next piece of the body.

        Raises:
            TooLarge: The request needs more than VAE_MEMORY_BYTES.
            Overloaded: Other requests leave too little.
        """
        self._take(size)
        self._body += size

    def reserve(self, size: int) -> None:
        """Take `size` further bytes for decoding the body.

        Raises:
            TooLarge: The request needs more than VAE_MEMORY_BYTES.
            Overloaded: Other requests leave too little.
        """
        self._take(size)
        self._reading += size

    def keep(self, size: int) -> None:
        """Return the bytes of decoding to the budget, except `size` bytes for the decoded rows."""
        surplus = self._reading - size
        if surplus > 0:
            self._reading = size
            self._take(-surplus)

    def need(self, size: int) -> None:
        """Take the bytes that the answer needs at once. A call with a larger size takes only the difference.

        Raises:
            TooLarge: The request needs more than VAE_MEMORY_BYTES.
            Overloaded: Other requests leave too little.
        """
        if size > self._answer:
            self._take(size - self._answer)
            self._answer = size

    def hold(self) -> None:
        """Add a holder; each one must call `give_back`."""
        self._holders += 1

    def give_back(self) -> None:
        """Remove a holder; the last one returns the share to the budget."""
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


def answer_bytes(
    model: Model, options: Any, rows: int, size: tuple[int, int] | None = None, *, levels: str | None = None
) -> int:
    """Estimate the memory of answering `rows` rows at once, in bytes.

    Args:
        model: The model.
        options: The options of the request.
        rows: Number of rows.
        size: Height and width of images; None for a model of one size.
        levels: Type of the levels that the images of the answer are, of which a picture is written.
    """
    image, latent = math.prod(model.input_shape), math.prod(model.latent_shape)
    if size is not None:
        height, width = model.padded(size)
        image, latent = model.input_shape[0] * height * width, math.prod(model.latent_at(height, width))
    if levels is None:
        return NUMBER_BYTES * rows * int(options.memory_numbers(model, image, latent))
    pixels, others = int(options.memory_levels(model, image)), int(options.memory_numbers(model, 0, latent))
    return rows * (LEVEL_BYTES[levels] * pixels + NUMBER_BYTES * others)
