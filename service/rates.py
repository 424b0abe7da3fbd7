"""How often callers have called: what the `limits` library counts with, in one event loop."""

from __future__ import annotations

import time

from limits.storage import MemoryStorage

CLEAN_S = 10.0
"""How often counts that have run out are forgotten."""


class Counts(MemoryStorage):
    """The library's own in memory, but for the thread that it starts to clean up after nearly every call."""

    def __init__(self, clean_s: float = CLEAN_S) -> None:
        super().__init__()
        self._clean_s = clean_s
        self._clean_at = 0.0

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Count, for so many seconds."""
        now = time.monotonic()
        if now >= self._clean_at:
            self._clean_at = now + self._clean_s
            for counted in list(self.expirations):
                self.get(counted)  # drops what has run out
        if not self.get(key):
            self.expirations[key] = time.time() + expiry
        self.storage[key] += amount
        return self.storage[key]
