"""What requests take in memory, by estimates, so that too much is refused before it is there and nothing is killed."""

from __future__ import annotations

import math
from typing import Any

from service.errors import Overloaded, TooLarge
from service.model import Model
from service.refinement import STEPS

NUMBER_BYTES = 16
"""Of an answer, as array and as text."""
RETRY_S = 1.0


class Memory:
    """What all requests under way may take together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0


class Share:
    """One request's part of it: its body and the most that it needs beside."""

    __slots__ = ("_beside", "_body", "_memory")

    def __init__(self, memory: Memory) -> None:
        self._memory, self._body, self._beside = memory, 0, 0

    def grow(self, size: int) -> None:
        """For more of the body.

        Raises: as `need` does.
        """
        self._take(size)
        self._body += size

    def need(self, size: int) -> None:
        """For so much beside the body at once; what was needed before may be among it.

        Raises: TooLarge for more than there is, Overloaded for more than others leave.
        """
        if size > self._beside:
            self._take(size - self._beside)
            self._beside = size

    def give_back(self) -> None:
        """Leave it to others."""
        self._memory.taken -= self._body + self._beside

    def _take(self, size: int) -> None:
        memory, whole = self._memory, self._body + self._beside + size
        if whole > memory.limit:
            raise TooLarge(
                f"the request needs about {whole} bytes of memory and VAE_MEMORY_BYTES is {memory.limit}; send fewer "
                "rows or draws, or accept a binary form, whose many rows come in parts"
            )
        if memory.taken + size > memory.limit:
            raise Overloaded(
                f"requests under way leave {memory.limit - memory.taken} bytes of VAE_MEMORY_BYTES "
                f"({memory.limit}), and this one needs {size} more; try again later",
                RETRY_S,
            )
        memory.taken += size


def answer_bytes(model: Model, options: Any, rows: int) -> int:
    """About what it takes to answer `rows` rows at once: pictures, draws, the noise of refinement."""
    image, latent = math.prod(model.input_shape), math.prod(model.latent_shape)
    numbers = rows * (options.pictures * image + options.multiplicity * latent)
    if options.said("quality") == "refined":
        numbers += rows * STEPS * latent
    return NUMBER_BYTES * numbers
