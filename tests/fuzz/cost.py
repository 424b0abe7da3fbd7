"""What reading a body may cost: time and memory of at most a small multiple of the body and of what the Meter allowed.

A short input hides what grows with its square: tests/fuzz/growing.py makes large ones.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from service.codecs.payload import Meter, Payload
from service.errors import TooLarge

MAX_PIXELS = 2**20
MAX_BYTES = 2**28
"""What the Meter allows; the service's own is VAE_MEMORY_BYTES. A file may declare tiles larger than any memory."""
BASE_S, UNIT_S = 0.25, 2e-6
"""Processor time that any body may take, and that each byte of it may take besides.

Many times what the readers take on a slow machine: what is found is of another order, not late by chance.
"""
PIXEL_UNITS, PICTURE_UNITS = 0.1, 128
"""What a pixel and a picture that the Meter allowed count as, in bytes: the smallest takes a tenth of a millisecond."""
MEASURED = 3
"""How often a suspect is measured; the fastest counts."""
BASE_BYTES, MULTIPLE = 2**20, 12
"""Memory that any body may take beyond what the Meter was asked for, and that a byte of it may take."""


class Costly(Exception):
    """Reading took more than it may; the message says what, and how much."""


class Ledger(Meter):
    """A Meter that adds up what it was asked for, and refuses more than `MAX_BYTES`."""

    def __init__(self) -> None:
        self.bytes, self.pixels, self.pictures = 0, 0, 0
        super().__init__(MAX_PIXELS, reserve=self._note)

    def picture(self, width: int, height: int, pixel_bytes: int, pages: int = 1) -> None:
        """As Meter's; pixels that were refused were not allowed."""
        super().picture(width, height, pixel_bytes, pages)
        self.pixels += width * height * pages
        self.pictures += pages

    @property
    def units(self) -> float:
        """What it allowed, in bytes of a body that take as long."""
        return PIXEL_UNITS * self.pixels + PICTURE_UNITS * self.pictures

    def _note(self, size: int) -> None:
        if self.bytes + size > MAX_BYTES:
            raise TooLarge(f"{self.bytes + size} bytes; at most {MAX_BYTES}")
        self.bytes += size


def check_time(read: Callable[[Meter], object], size: int) -> None:
    """Read, and read again where it seems too slow.

    Args:
        read: Reads a body, asking the Meter that it is given; may raise.
        size: Bytes of the body.

    Raises:
        Costly: It takes more processor time than `BASE_S` and `UNIT_S` allow, each time.
        Exception: What `read` raises.
    """
    least, raised = float("inf"), None
    for _ in range(MEASURED):
        ledger, raised = Ledger(), None
        started = time.thread_time()
        try:
            read(ledger)
        except Exception as error:  # noqa: BLE001  # raised below
            raised = error
        least = min(least, time.thread_time() - started)
        most = BASE_S + UNIT_S * (size + ledger.units)
        if least <= most:
            break
    else:
        raise Costly(f"{least:.2f} s for {size} bytes and {ledger.pixels} pixels; at most {most:.2f}")
    if raised is not None:
        raise raised


def check_memory(read: Callable[[Meter], object], size: int) -> None:
    """Read, and compare the peak of Python's and numpy's memory with what the Meter was asked for.

    Pillow's own memory is not seen; what becomes of a picture is.

    Raises:
        Costly: The peak is above that by more than `BASE_BYTES` and `MULTIPLE` allow.
        Exception: What `read` raises.
    """
    ledger = Ledger()
    tracemalloc.start()
    try:
        read(ledger)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        most = ledger.bytes + BASE_BYTES + MULTIPLE * size
        if peak > most:
            raise Costly(f"{peak} bytes for a body of {size}, and the Meter was asked for {ledger.bytes}")


def check_result(payload: Payload, ledger: Ledger, size: int) -> None:
    """Compare what was read with what the Meter was asked for: a count, the same on every machine.

    Raises: Costly.
    """
    held = sum(map(_held, (payload.array, payload.mask)))
    if held > ledger.bytes + BASE_BYTES + MULTIPLE * size:
        raise Costly(f"{held} bytes came of a body of {size}, and the Meter was asked for {ledger.bytes}")


def _held(array: np.ndarray[Any, Any] | None) -> int:
    """Bytes that an array keeps in memory: a broadcast axis takes none."""
    if array is None:
        return 0
    axes = zip(array.shape, array.strides, strict=True)
    return array.itemsize * int(np.prod([side for side, stride in axes if stride], dtype=np.int64))
