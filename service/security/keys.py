"""API keys with names, rights and limits, read from a file and again when it changes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from limits import RateLimitItem, parse_many

from service.errors import StartError

log = logging.getLogger(__name__)

INFER = "infer"
CONTROL = "control"
RIGHTS = (INFER, CONTROL)
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
MIN_CHARACTERS = 16
CHECK_INTERVAL_S = 1.0
"""Shortest interval between two checks of the file."""
FORM = "a line is `name key-or-sha256:digest rights [rate=100/minute] [concurrency=4]`"


Stamp = tuple[int, int, int]


class NoKeys(StartError):
    """The file holds no key."""


class Limits(NamedTuple):
    """Rate limits of a caller, and its maximum of concurrent calls (0 is any number)."""

    rates: tuple[RateLimitItem, ...] = ()
    concurrency: int = 0


class Key(NamedTuple):
    """An API key. Only its SHA-256 digest is kept."""

    name: str
    digest: bytes
    rights: frozenset[str]
    limits: Limits


class Keyring:
    """The API keys of a file. If the file holds none, since all were revoked, no caller is accepted.

    Args:
        path: The file.
        clock: Time in seconds, which never goes back.

    Raises:
        StartError: A line cannot be read; the message names it.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._empty = False
        self._exposed = False
        self._stamp = self._read_stamp()
        self._checked = clock()
        self._keys: tuple[Key, ...] = ()
        try:
            self._keys = read_keys(path)
        except NoKeys as error:
            log.warning("no API key is valid: %s", error)

    def find(self, token: bytes) -> Key | None:
        """Return the key of a token, in a time that does not depend on which key it is; None if it is unknown."""
        if self._clock() - self._checked >= CHECK_INTERVAL_S:
            self._reread()
        digest, found = hashlib.sha256(token).digest(), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    async def watch(self) -> None:
        """Check the file until cancelled, so that keys are revoked in time even without requests."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            self._reread()

    def _reread(self) -> None:
        """Read the keys if the file has changed. If it cannot be read, the old keys stay.

        They also stay if the file is empty, as it is while it is written, until the next check finds it empty again.
        """
        self._checked = self._clock()
        stamp = self._read_stamp()
        if stamp == self._stamp and not self._empty:
            return
        self._stamp, was_empty, self._empty = stamp, self._empty, False
        try:
            keys = read_keys(self._path)
        except NoKeys as error:
            self._empty = not was_empty
            if was_empty and self._keys:
                self._keys = ()
                log.warning("no API key is valid any more: %s", error)
        except StartError as error:
            log.error("the API keys stay as they were: %s", error)  # noqa: TRY400  # the message says all
        else:
            if keys != self._keys:
                self._keys = keys
                log.warning("the API keys have changed: %s", ", ".join(key.name for key in keys))

    def _read_stamp(self) -> Stamp | None:
        """Return what changes with the file's content or with the target of a link. Warns if others can access it."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        exposed = bool(found.st_mode & (stat.S_IROTH | stat.S_IWOTH))
        if exposed and not self._exposed:
            log.warning(
                "every user of this machine can read or write the API keys in %s; `chmod o= %s` keeps them out",
                self._path, self._path,
            )  # fmt: skip
        self._exposed = exposed
        return found.st_mtime_ns, found.st_ino, found.st_size


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read the keys of a file, one a line. Empty lines and lines that begin with # are skipped.

    Raises:
        NoKeys: The file holds none.
        StartError: A line cannot be read; the message names the line, never the key.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"cannot read the API keys of VAE_API_KEYS, {path}: {error}") from error
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            key = _key(words)
        except ValueError as error:
            raise StartError(f"{path}, line {number}: {error}; {FORM}") from error
        if key.name in keys or key.digest in {other.digest for other in keys.values()}:
            raise StartError(f"{path}, line {number}: the name or the key occurs twice")
        keys[key.name] = key
    if not keys:
        raise NoKeys(f"{path} holds no API key; {FORM}")
    return tuple(keys.values())


def _key(words: list[str]) -> Key:
    """Read the words of a line; raises ValueError."""
    if len(words) < 3:
        raise ValueError("name, key or rights are missing")
    name, secret, rights, *limits = words
    if not NAME.fullmatch(name):
        raise ValueError("a name has letters, digits, `.`, `_` and `-`")
    unknown = set(rights.split(",")) - set(RIGHTS)
    if unknown:
        raise ValueError(f"unknown right {', '.join(sorted(unknown))}; there are {', '.join(RIGHTS)}")
    return Key(name, _digest(secret), frozenset(rights.split(",")), _limits(limits))


def _digest(secret: str) -> bytes:
    """Return the digest of a key; raises ValueError for a key that can be guessed."""
    hashed = HASHED.fullmatch(secret)
    if hashed:
        return bytes.fromhex(hashed[1])
    if secret.startswith("sha256:"):
        raise ValueError("sha256: wants 64 hexadecimal digits")
    if len(secret) < MIN_CHARACTERS:
        raise ValueError(f"a key has at least {MIN_CHARACTERS} characters; `openssl rand -hex 32` makes one")
    return hashlib.sha256(secret.encode()).digest()


def _limits(words: list[str]) -> Limits:
    """Read `rate=` and `concurrency=`; raises ValueError."""
    named = dict(word.split("=", 1) for word in words if "=" in word)
    if len(named) != len(words) or named.keys() - {"rate", "concurrency"}:
        raise ValueError("limits are rate= and concurrency=, once each")
    concurrency = named.get("concurrency", "0")
    if not concurrency.isdigit():
        raise ValueError(f"concurrency is a whole number, not {concurrency}")
    return limits_of(named.get("rate", ""), int(concurrency))


def limits_of(rate: str, concurrency: int) -> Limits:
    """Parse limits as they are written in settings, such as `5/second,100/minute`.

    Raises:
        ValueError: The rate cannot be read.
    """
    return Limits(tuple(parse_many(rate)) if rate else (), concurrency)
