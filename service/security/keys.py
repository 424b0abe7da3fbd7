"""API keys: whose they are, what they allow and how often; read from a file, and again when it changes."""

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
LEAST_CHARACTERS = 16
LOOK_S = 1.0
"""How often the file may be looked at."""
FORM = "a line is `name key-or-sha256:digest rights [rate=100/minute] [concurrency=4]`"


Stamp = tuple[int, int, int]


class NoKeys(StartError):
    """A file of keys without any."""


class Limits(NamedTuple):
    """How often a caller may call, and how many calls may run at the same time (0 is any number)."""

    rates: tuple[RateLimitItem, ...] = ()
    concurrency: int = 0


class Key(NamedTuple):
    """A key is known by its SHA-256 digest alone."""

    name: str
    digest: bytes
    rights: frozenset[str]
    limits: Limits


class Keyring:
    """The keys of a file."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """A file without keys, whose keys were all revoked, lets nobody in.

        Raises: StartError naming the line that cannot be read.
        """
        self._path = path
        self._clock = clock
        self._empty = False
        self._exposed = False
        self._stamp = self._look_at()
        self._looked = clock()
        self._keys: tuple[Key, ...] = ()
        try:
            self._keys = read_keys(path)
        except NoKeys as error:
            log.warning("no API key is valid: %s", error)

    def find(self, token: bytes) -> Key | None:
        """The key, looked for in a time that does not tell which one it is."""
        if self._clock() - self._looked >= LOOK_S:
            self._reread()
        digest, found = hashlib.sha256(token).digest(), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    async def watch(self) -> None:
        """Look at the file for as long as it runs, so that keys are revoked in time also where nobody calls."""
        while True:
            await asyncio.sleep(LOOK_S)
            self._reread()

    def _reread(self) -> None:
        """Take the keys of a file that has changed; where it cannot be read the old ones stay.

        So they do where it is empty, as it is while somebody writes it, until the next look finds it empty again.
        """
        self._looked = self._clock()
        stamp = self._look_at()
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

    def _look_at(self) -> Stamp | None:
        """What changes with the file's content, also where a link is turned to another one. Warns of its mode."""
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
    """The keys of a file, a line each; empty lines and those that begin with # are skipped.

    Raises: StartError naming the line, never the key.
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
            raise StartError(f"{path}, line {number}: the name or the key is there twice")
        keys[key.name] = key
    if not keys:
        raise NoKeys(f"{path} holds no API key; {FORM}")
    return tuple(keys.values())


def _key(words: list[str]) -> Key:
    """Raises: ValueError."""
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
    """Raises: ValueError for a key that may be guessed."""
    hashed = HASHED.fullmatch(secret)
    if hashed:
        return bytes.fromhex(hashed[1])
    if secret.startswith("sha256:"):
        raise ValueError("sha256: wants 64 hexadecimal digits")
    if len(secret) < LEAST_CHARACTERS:
        raise ValueError(f"a key has at least {LEAST_CHARACTERS} characters; `openssl rand -hex 32` makes one")
    return hashlib.sha256(secret.encode()).digest()


def _limits(words: list[str]) -> Limits:
    """Raises: ValueError."""
    named = dict(word.split("=", 1) for word in words if "=" in word)
    if len(named) != len(words) or named.keys() - {"rate", "concurrency"}:
        raise ValueError("limits are rate= and concurrency=, once each")
    concurrency = named.get("concurrency", "0")
    if not concurrency.isdigit():
        raise ValueError(f"concurrency is a whole number, not {concurrency}")
    return limits_of(named.get("rate", ""), int(concurrency))


def limits_of(rate: str, concurrency: int) -> Limits:
    """Limits as they are written in settings.

    Raises: ValueError.
    """
    return Limits(tuple(parse_many(rate)) if rate else (), concurrency)
