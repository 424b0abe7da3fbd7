"""Counts of calls and of running calls by caller, over all workers, without a server or a lock.

Each worker writes a file of its own in the shared folder and adds the counts in the files of the others. Two workers
that count at the same instant may both accept the last allowed call. A worker locks its file as long as it runs; the
worker that replaces a dead one takes over its file.
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
"""A set of counters with the same place: digests of their names, ends of their windows (infinity for running calls, 0
for a free counter), counts in these windows, and counts in the windows before."""
SIZE = SETS * SET.size
MAX_COUNT = 2**32 - 1
CHECK_INTERVAL_S = 1.0
"""Interval at which a worker searches for files of new workers."""
MIN_WAIT_S = 0.001
FILE_NAME = "counts-{}"


class Place(NamedTuple):
    """The place of a counter: the digest of its name, and the offset of its set."""

    digest: int
    offset: int


class CallCounts:
    """Counts of one worker, added to those of the others. A full set drops the counter whose window ends first.

    Args:
        folder: Folder of all workers; None where there is one worker.
        clock: Time in seconds, the same for all workers.

    Raises:
        StartError: The folder has no room.
    """

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._secret = folder.name.encode()[-64:] if folder else secrets.token_bytes()
        self._running: Counter[str] = Counter()
        self._others: dict[Path, tuple[BinaryIO, mmap.mmap]] = {}
        self._check_at = 0.0
        self._path: Path | None = None
        self._own: bytearray | mmap.mmap = bytearray(SIZE)
        if folder:
            self._path, self._own = _claim(folder)

    def hit(self, rate: RateLimitItem, caller: str) -> float:
        """Count a call in a sliding window.

        Calls of the window before count by the share of it that is less than one window ago, as if they were evenly
        spread.

        Returns:
            0.0 if the rate allows the call; else the seconds until it will.
        """
        length = float(rate.get_expiry())
        now = self._clock()
        end = (now // length + 1.0) * length
        place = self._place(rate.key_for(caller))
        counted = [_window(memory, place, end, length) for memory in self._memories()]
        current, before = (sum(column) for column in zip(*counted, strict=True))
        if math.floor(before * (end - now) / length + current) >= rate.amount:
            if current < rate.amount:
                return max(MIN_WAIT_S, end - now - length * (rate.amount - current) / before)
            return end - now + length * (1.0 - rate.amount / current)
        own_current, own_before = counted[0]
        _write(self._own, place, end, own_current + 1, own_before)
        return 0.0

    def running(self, caller: str) -> int:
        """Return the running calls of a caller, in all workers that run."""
        running = self._running[caller]
        if self._folder is not None:
            self._open_others()
            place = self._place(caller)
            for file, memory in self._others.values():
                theirs = _window(memory, place, math.inf, math.inf)[0]
                running += theirs if theirs and _is_locked(file) else 0
        return running

    def begin(self, caller: str) -> None:
        """Count one more running call."""
        self._running[caller] += 1
        self._publish(caller)

    def end(self, caller: str) -> None:
        """Count one running call as ended."""
        self._running[caller] -= 1
        self._publish(caller)
        if not self._running[caller]:
            del self._running[caller]

    def close(self) -> None:
        """Release the files; calls that still run are counted in memory."""
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
        """Yield the counters of every worker, those of this one first."""
        yield self._own
        if self._folder is not None:
            self._open_others()
            for _, memory in self._others.values():
                yield memory

    def _open_others(self) -> None:
        """Open the files of workers that have started since the last check."""
        now = time.monotonic()
        if now < self._check_at or self._folder is None:
            return
        self._check_at = now + CHECK_INTERVAL_S
        for path in self._folder.glob(FILE_NAME.format("*")):
            if path != self._path and path not in self._others and path.stat().st_size == SIZE:
                file = path.open("rb")
                self._others[path] = file, mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ)

    def _place(self, name: str) -> Place:
        """Hash a name to a place. The hash is keyed, so that callers cannot choose names that share a set."""
        digest = hashlib.blake2b(name.encode(), digest_size=8, key=self._secret).digest()
        number = int.from_bytes(digest, "little") or 1
        return Place(number, number % SETS * SET.size)


def _window(memory: bytearray | mmap.mmap, place: Place, end: float, length: float) -> tuple[int, int]:
    """Return a counter's counts for the window with this end and for the one before."""
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
    """Set a counter, in its own place or in that of the counter whose window ends first."""
    digest, offset = place
    values = list(SET.unpack_from(memory, offset))
    at = values.index(digest) if digest in values[:WAYS] else min(range(WAYS), key=lambda way: values[way + WAYS])
    values[at::WAYS] = digest, end, min(current, MAX_COUNT), min(before, MAX_COUNT)
    SET.pack_into(memory, offset, *values)


def _claim(folder: Path) -> tuple[Path, mmap.mmap]:
    """Take the first file without a running worker, and reset the running calls of its previous one.

    Raises:
        StartError: The folder has no room.
    """
    try:
        path, file = next(_free(folder))
        with file:
            os.posix_fallocate(
                file.fileno(), 0, SIZE
            )  # on a full disk, writing to mapped memory would kill the process
            memory = mmap.mmap(file.fileno(), SIZE)  # the mapping keeps the file open, and so the lock
    except OSError as error:
        raise StartError(f"cannot count calls in {folder} ({error.strerror}); make room, or set TMPDIR") from error
    for offset in range(0, SIZE, SET.size):
        values = list(SET.unpack_from(memory, offset))
        values[WAYS : 2 * WAYS] = [0.0 if end == math.inf else end for end in values[WAYS : 2 * WAYS]]
        SET.pack_into(memory, offset, *values)
    return path, memory


def _free(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield the files without a running worker, locked."""
    for number in count():
        path = folder / FILE_NAME.format(number)
        path.touch(0o600)
        file = path.open("r+b")
        if _lock(file, fcntl.LOCK_EX):
            yield path, file
        else:
            file.close()


def _lock(file: BinaryIO, kind: int) -> bool:
    """Take the lock if it is free. The system releases it whenever the process ends."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(file: BinaryIO) -> bool:
    """Return whether a running process holds the lock."""
    taken = _lock(file, fcntl.LOCK_SH)
    if taken:
        fcntl.flock(file, fcntl.LOCK_UN)
    return not taken
