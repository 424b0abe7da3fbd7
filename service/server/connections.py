"""Limits on open connections: of a worker, and of a client address over all workers."""

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
"""Connections above the limits that stay open for a moment, so that a full service still answers health checks."""
ROWS, SLOTS = 4, 1 << 14
"""Size of the table of counts. An address has one slot a row; the smallest of its counts is nearly always exact."""
SIZE = 2 * ROWS * SLOTS
PATTERN = "connections-*.counts"


class Connections:
    """Limits on the connections of one worker.

    Args:
        settings: The settings of the service.
        shared_folder: Folder of all workers, for counts by address; None where there is one worker.
    """

    def __init__(self, settings: Settings, shared_folder: Path | None = None) -> None:
        self._settings = settings
        self._shared_folder = shared_folder
        self._spare: dict[Any, Callable[[], None]] = {}

    def over(self, open_now: int, client: tuple[str, int] | None) -> TooManyConnections | None:
        """Check and count a new connection.

        Args:
            open_now: Open connections of this worker, the new one included.
            client: Address and port; None for a unix socket.

        Returns:
            The error if the connection is above a limit. It is then not counted.
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
        """Count a connection as closed. Call it only for one that `over` has counted."""
        if self._settings.max_connections_per_address and self._is_counted(client):
            self._counts.add(address_of({"client": client}), -1)

    def keep(self, connection: object, give_up: Callable[[], None]) -> None:
        """Keep a connection above the limits until its request comes.

        Args:
            connection: Any hashable object.
            give_up: Closes the connection; called if SPARE newer ones come first.
        """
        self._spare[connection] = give_up
        if len(self._spare) > SPARE:
            self._spare.pop(next(iter(self._spare)))()

    def release(self, connection: object) -> None:
        """Stop counting a connection among the spare ones: its request came, or it is closed."""
        self._spare.pop(connection, None)

    def _is_counted(self, client: tuple[str, int] | None) -> bool:
        """Whether the limit by address applies: to neither trusted proxies nor unix sockets."""
        return client is not None and not self._proxies.sent({"client": client})

    @cached_property
    def _proxies(self) -> Proxies:
        return Proxies(self._settings.trusted_proxies)

    @cached_property
    def _counts(self) -> ConnectionCounts:
        """Open the table at the first connection, after the worker was forked."""
        return ConnectionCounts(self._shared_folder)


class ConnectionCounts:
    """Counts of connections by address, over all workers that share a folder.

    Every worker writes a table of its own and reads the tables of all running workers. So no lock can stay locked, and
    the counts of a killed worker vanish with it. Addresses are hashed, so the tables do not grow.

    Args:
        folder: Folder of all workers; None counts this worker alone.
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
        """Return the count of an address: never too low, and rarely too high."""
        slots = self._slots(address)
        tables = [self._own, *self._living()]
        return min(sum(table[slot] for table in tables) for slot in slots)

    def add(self, address: str, change: int) -> None:
        """Add to the count of an address in this worker."""
        for slot in self._slots(address):
            self._own[slot] = min(65535, max(0, self._own[slot] + change))

    def _slots(self, address: str) -> list[int]:
        """Hash an address to slots. The key is random, so clients cannot choose addresses that collide."""
        digest = blake2b(address.encode(), digest_size=2 * ROWS, key=self._key).digest()
        numbers = memoryview(digest).cast("H")
        return [row * SLOTS + number % SLOTS for row, number in enumerate(numbers)]

    def _living(self) -> list[memoryview]:
        """Return the tables of the other workers. A table without a lock belonged to a dead worker and is removed."""
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
    """Create this worker's table, and lock it for as long as the worker runs.

    Raises:
        OSError: The folder has no room.
    """
    path = folder / PATTERN.replace("*", secrets.token_hex(8))
    draft = path.with_suffix(".draft")
    file = os.open(draft, os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(file, 0, SIZE)  # a full disk fails here, not with SIGBUS later
    fcntl.flock(file, fcntl.LOCK_EX)
    table = memoryview(mmap.mmap(file, SIZE)).cast("H")
    draft.replace(path)
    return path, table
