"""How often callers call, and how many of their calls run: counted by all workers together, without a server or a lock.

Each worker writes to a file of its own in the folder that the workers share, and adds up what the files of the others
hold. Two workers that count at the same instant may both let the last call pass. A file is locked for as long as its
worker lives: the worker that is started in the place of a dead one takes the file over.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import mmap
import os
import secrets
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple

from limits import RateLimitItem

from service.errors import StartError

WAYS = 8
SETS = 1024
SET = struct.Struct(f"<{WAYS}Q{WAYS}d{WAYS}I{WAYS}I")
"""Counters with the same place: whose they are, when their windows end (never, for running calls; 0 is a free one),
what was counted in these windows, and in those before."""
SIZE = SETS * SET.size
MOST = 2**32 - 1
LOOK_S = 1.0
"""How often a worker looks for files of new workers."""
LEAST_S = 0.001
FILE_NAME = "counts-{}"


class Place(NamedTuple):
    """Where a counter is: the digest of its name, and the offset of its set."""

    digest: int
    offset: int


class Counts:
    """Counts of one worker, added to those of the others. A full set forgets the counter whose window ends first."""

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """folder: the workers' (None: there is one worker). clock: the same for all of them.

        Raises: StartError where the folder has no room.
        """
        self._folder = folder
        self._clock = clock
        self._secret = folder.name.encode()[-64:] if folder else secrets.token_bytes()
        self._running: Counter[str] = Counter()
        self._others: dict[Path, tuple[BinaryIO, mmap.mmap]] = {}
        self._look_at = 0.0
        self._path: Path | None = None
        self._own: bytearray | mmap.mmap = bytearray(SIZE)
        if folder:
            self._path, self._own = _claim(folder)

    def hit(self, rate: RateLimitItem, caller: str) -> float:
        """Count a call, in sliding windows. 0.0 if the rate allows it, else the seconds until it will.

        The window before counts by the part of it that is less than a window ago, as if its calls were evenly spread.
        """
        length = float(rate.get_expiry())
        now = self._clock()
        end = (now // length + 1.0) * length
        place = self._place(rate.key_for(caller))
        counted = [_window(memory, place, end, length) for memory in self._memories()]
        current, before = (sum(column) for column in zip(*counted, strict=True))
        if math.floor(before * (end - now) / length + current) >= rate.amount:
            if current < rate.amount:
                return max(LEAST_S, end - now - length * (rate.amount - current) / before)
            return end - now + length * (1.0 - rate.amount / current)
        own_current, own_before = counted[0]
        _write(self._own, place, end, own_current + 1, own_before)
        return 0.0

    def running(self, caller: str) -> int:
        """Calls of a caller that run now, in all workers that live."""
        running = self._running[caller]
        if self._folder is not None:
            self._look()
            place = self._place(caller)
            for file, memory in self._others.values():
                theirs = _window(memory, place, math.inf, math.inf)[0]
                running += theirs if theirs and _is_locked(file) else 0
        return running

    def begin(self, caller: str) -> None:
        """One more runs."""
        self._running[caller] += 1
        self._publish(caller)

    def end(self, caller: str) -> None:
        """One of them is over."""
        self._running[caller] -= 1
        self._publish(caller)
        if not self._running[caller]:
            del self._running[caller]

    def close(self) -> None:
        """Leave the files to others; calls that still run are counted in memory."""
        for file, memory in self._others.values():
            memory.close()
            file.close()
        self._others.clear()
        if isinstance(self._own, mmap.mmap):
            self._own.close()
        self._folder, self._own = None, bytearray(SIZE)

    def _publish(self, caller: str) -> None:
        if self._folder is not None:
            running = self._running[caller]
            _write(self._own, self._place(caller), math.inf if running else 0.0, running, 0)

    def _memories(self) -> Iterator[bytearray | mmap.mmap]:
        """The own one first."""
        yield self._own
        if self._folder is not None:
            self._look()
            for _, memory in self._others.values():
                yield memory

    def _look(self) -> None:
        """Open the files of workers that have been started since the last look."""
        now = time.monotonic()
        if now < self._look_at or self._folder is None:
            return
        self._look_at = now + LOOK_S
        for path in self._folder.glob(FILE_NAME.format("*")):
            if path != self._path and path not in self._others and path.stat().st_size == SIZE:
                file = path.open("rb")
                self._others[path] = file, mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ)

    def _place(self, name: str) -> Place:
        """Nobody outside can choose names that share a set: the digest has a secret."""
        digest = hashlib.blake2b(name.encode(), digest_size=8, key=self._secret).digest()
        number = int.from_bytes(digest, "little") or 1
        return Place(number, number % SETS * SET.size)


def _window(memory: bytearray | mmap.mmap, place: Place, end: float, length: float) -> tuple[int, int]:
    """What a counter holds for the window that ends then and for the one before."""
    digest, offset = place
    values = SET.unpack_from(memory, offset)
    if digest not in values[:WAYS]:
        return 0, 0
    at = values.index(digest)
    its_end, current, before = values[at + WAYS], values[at + 2 * WAYS], values[at + 3 * WAYS]
    if its_end == end:
        return current, before
    return 0, current if abs(its_end - (end - length)) < length / 2 else 0


def _write(memory: bytearray | mmap.mmap, place: Place, end: float, current: int, before: int) -> None:
    """Set a counter, in its place or in that of the one whose window ends first."""
    digest, offset = place
    values = list(SET.unpack_from(memory, offset))
    at = values.index(digest) if digest in values[:WAYS] else min(range(WAYS), key=lambda way: values[way + WAYS])
    values[at::WAYS] = digest, end, min(current, MOST), min(before, MOST)
    SET.pack_into(memory, offset, *values)


def _claim(folder: Path) -> tuple[Path, mmap.mmap]:
    """The first file that no living worker has, without the running calls of the one that had it.

    Raises: StartError.
    """
    try:
        path, file = next(_free(folder))
        with file:
            os.posix_fallocate(file.fileno(), 0, SIZE)  # to write where no room is left would kill the process
            memory = mmap.mmap(file.fileno(), SIZE)  # it keeps the lock, which is the open file's
    except OSError as error:
        raise StartError(f"cannot count calls in {folder} ({error.strerror}); make room, or set TMPDIR") from error
    for offset in range(0, SIZE, SET.size):
        values = list(SET.unpack_from(memory, offset))
        values[WAYS : 2 * WAYS] = [0.0 if end == math.inf else end for end in values[WAYS : 2 * WAYS]]
        SET.pack_into(memory, offset, *values)
    return path, memory


def _free(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Files that no living worker has, locked."""
    for number in count():
        path = folder / FILE_NAME.format(number)
        path.touch(0o600)
        file = path.open("r+b")
        if _lock(file, fcntl.LOCK_EX):
            yield path, file
        else:
            file.close()


def _lock(file: BinaryIO, kind: int) -> bool:
    """Take the lock if nobody else has it. The system gives it back when a process ends, however it ends."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(file: BinaryIO) -> bool:
    """Whether a living process has the lock."""
    taken = _lock(file, fcntl.LOCK_SH)
    if taken:
        fcntl.flock(file, fcntl.LOCK_UN)
    return not taken
