"""How many connections are open, in all and by client address, and which of them are only there for health."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from service.errors import TooManyConnections
from service.security.middleware import address_of
from service.security.proxies import Proxies
from service.settings import Settings

log = logging.getLogger(__name__)

SPARE = 16
"""Connections above the limits that are kept at the same time, so that health is answered when the service is full."""
ROWS, SLOTS = 4, 1 << 14
"""Of the table of counts: an address has a slot in each row, and the smallest count of them is nearly always its."""
SIZE = 2 * ROWS * SLOTS
PATTERN = "connections-*.counts"


class Connections:
    """The limits on connections of one process. What it counts by address the other workers see."""

    def __init__(self, settings: Settings, shared_folder: Path | None = None) -> None:
        self._settings = settings
        self._shared_folder = shared_folder
        self._spare: dict[Any, Callable[[], None]] = {}

    def over(self, open_now: int, client: tuple[str, int] | None) -> TooManyConnections | None:
        """What is wrong with one connection more from a client; None, and then it is counted, where nothing is.

        open_now: connections of this worker, the new one included.
        """
        settings = self._settings
        if open_now > settings.max_connections:
            return TooManyConnections(
                f"{settings.max_connections} connections are open, VAE_MAX_CONNECTIONS; close some"
            )
        limit = settings.max_connections_per_address
        if limit and self._is_counted(client):
            address = address_of({"client": client})
            if self._counts.of(address) >= limit:
                return TooManyConnections(
                    f"{address} has {limit} connections open, VAE_MAX_CONNECTIONS_PER_ADDRESS; close some"
                )
            self._counts.add(address, 1)
        return None

    def closed(self, client: tuple[str, int] | None) -> None:
        """Count one less that was let in."""
        if self._settings.max_connections_per_address and self._is_counted(client):
            self._counts.add(address_of({"client": client}), -1)

    def keep(self, connection: object, give_up: Callable[[], None]) -> None:
        """Keep a connection above the limits until it asks; the oldest that has not asked gives way to a new one."""
        self._spare[connection] = give_up
        if len(self._spare) > SPARE:
            self._spare.pop(next(iter(self._spare)))()

    def release(self, connection: object) -> None:
        """It has asked, or is gone."""
        self._spare.pop(connection, None)

    def _is_counted(self, client: tuple[str, int] | None) -> bool:
        """Not a trusted proxy, nor whoever comes by a unix socket."""
        return client is not None and not self._proxies.sent({"client": client})

    @cached_property
    def _proxies(self) -> Proxies:
        return Proxies(self._settings.trusted_proxies)

    @cached_property
    def _counts(self) -> Counts:
        """Made at the first connection, in the worker that counts."""
        return Counts(self._shared_folder)


class Counts:
    """Counts by address, of all workers that share a folder (None: of this one alone).

    Every worker writes to a table of its own and reads those of all that live, so there is no lock to be left locked,
    and what a killed worker had counted ends with it. Addresses are hashed: the tables do not grow.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._key = folder.name.encode()[-64:] if folder else secrets.token_bytes(16)
        self._path: Path | None = None
        self._others: dict[Path, tuple[int, memoryview]] = {}
        self._own = memoryview(bytearray(SIZE)).cast("H")
        if folder is not None:
            try:
                self._path, self._own = _new(folder)
            except OSError as error:
                log.warning("each worker counts connections by address for itself: %s", error)

    def of(self, address: str) -> int:
        """How many there are; never fewer, and hardly ever more."""
        slots = self._slots(address)
        tables = [self._own, *self._living()]
        return min(sum(table[slot] for table in tables) for slot in slots)

    def add(self, address: str, change: int) -> None:
        """Count one more, or one less, of this worker."""
        for slot in self._slots(address):
            self._own[slot] = min(65535, max(0, self._own[slot] + change))

    def _slots(self, address: str) -> list[int]:
        """Nobody can choose addresses that share them with somebody's: the key is the folder's name, made by chance."""
        digest = blake2b(address.encode(), digest_size=2 * ROWS, key=self._key).digest()
        numbers = memoryview(digest).cast("H")
        return [row * SLOTS + number % SLOTS for row, number in enumerate(numbers)]

    def _living(self) -> list[memoryview]:
        """Tables of the other workers; a table that nobody has locked is a dead worker's, and is removed."""
        if self._folder is None:
            return []
        for path in self._folder.glob(PATTERN):
            if path != self._path and path not in self._others:
                with suppress(OSError):  # another worker has just removed it
                    self._others[path] = _opened(path)
        for path, (file, _) in [*self._others.items()]:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                os.close(file)
                del self._others[path]
        return [table for _, table in self._others.values()]


def _opened(path: Path) -> tuple[int, memoryview]:
    file = os.open(path, os.O_RDONLY)
    return file, memoryview(mmap.mmap(file, SIZE, access=mmap.ACCESS_READ)).cast("H")


def _new(folder: Path) -> tuple[Path, memoryview]:
    """A table of this worker, which holds a lock on it for as long as it lives.

    Raises: OSError where there is no room for it.
    """
    path = folder / PATTERN.replace("*", secrets.token_hex(8))
    draft = path.with_suffix(".draft")
    file = os.open(draft, os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(file, 0, SIZE)  # a full disk is told here, not by SIGBUS later
    fcntl.flock(file, fcntl.LOCK_EX)
    table = memoryview(mmap.mmap(file, SIZE)).cast("H")
    draft.replace(path)
    return path, table
