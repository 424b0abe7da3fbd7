"""A real service of a small model, and clients that record the outcome of every request."""

from __future__ import annotations

import asyncio
import re
import resource
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from training.evaluation.served import started

ROOT = Path(__file__).parents[2]
OPEN_FILES = 4096
LIMIT_S = 20.0
"""Whoever waits longer hangs."""
RAW = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}


class Outcome(NamedTuple):
    """Outcome of one request: its status (0: closed before the answer, -1: closed during it)."""

    status: int
    content: bytes
    seconds: float


class Service(NamedTuple):
    """A service process, and the models that it was started with."""

    process: subprocess.Popen[str]
    url: str
    models: Path

    @property
    def port(self) -> int:
        """Of loopback."""
        return int(self.url.rsplit(":", 1)[1])

    @property
    def worker(self) -> int:
        """The process that serves; the one that was started watches it."""
        (pid,) = workers_of(self.process.pid)
        return pid

    def connections(self) -> int:
        """Those that it has taken and not closed."""
        return connections(self.port)

    def kib(self, measure: str) -> int:
        """A line of its memory in /proc."""
        found = re.search(rf"{measure}:\s+(\d+) kB", Path(f"/proc/{self.worker}/status").read_text())
        assert found
        return int(found[1])

    def metric(self, name: str) -> float:
        """The sum over its labels; 0 where it is not there."""
        lines = httpx.get(f"{self.url}/metrics", timeout=LIMIT_S).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


@pytest.fixture(scope="module")
def service(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests of a module, whose models they may spoil."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        pytest.skip(f"needs {OPEN_FILES} open files, the limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, OPEN_FILES), hard))
    models = shutil.copytree(small_models, tmp_path_factory.mktemp("own") / "models")
    with started(VAE_MODELS=str(models), VAE_THREADS="1") as (process, url):
        one = Service(process, url, models)
        eventually(lambda: answers(url))
        yield one


def workers_of(supervisor: int) -> list[int]:
    """Worker processes of a service."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text()
    return [int(child) for child in children.split()]


def connections(port: int) -> int:
    """Those that the process which listens there has taken and not closed; the kernel's own have no inode."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    named = [(local, remote, inode) for _, local, remote, *_, inode in (line.split()[:10] for line in lines)]
    return sum(
        local.endswith(f":{port:04X}") and remote[-4:] != "0000" and inode != "0" for local, remote, inode in named
    )


def answers(url: str) -> bool:
    """Whether it is ready."""
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def eventually(true: Callable[[], bool], seconds: float = LIMIT_S) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def wire(path: str, body: bytes = b"", **headers: str) -> bytes:
    """A whole request."""
    named = {"host": "localhost", **RAW, **headers, "content-length": str(len(body))}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in named.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, closed with the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Outcome:
    """What becomes of it; a hang is an error."""
    began = time.monotonic()
    head = b""
    try:
        async with asyncio.timeout(LIMIT_S):
            writer.write(request)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            assert length, head
            content = await reader.readexactly(int(length[1]))
    except TimeoutError as error:
        raise AssertionError(f"no answer within {LIMIT_S} s to {request[:60]!r}") from error
    except (OSError, asyncio.IncompleteReadError) as error:
        begun = head or (isinstance(error, asyncio.IncompleteReadError) and error.partial)
        return Outcome(-1 if begun else 0, b"", time.monotonic() - began)
    return Outcome(int(head.split()[1]), content, time.monotonic() - began)


async def ask(port: int, request: bytes) -> Outcome:
    """On a connection of its own; 0 too where none can be had."""
    try:
        async with connected(port) as (reader, writer):
            return await asked(reader, writer, request)
    except OSError:
        return Outcome(0, b"", 0.0)


async def keep_asking(port: int, request: bytes, stop: asyncio.Event) -> list[Outcome]:
    """One after the other on one connection, a new one where it was closed, until told to stop."""
    outcomes: list[Outcome] = []
    while not stop.is_set():
        try:
            async with connected(port) as (reader, writer):
                while not stop.is_set():
                    outcomes.append(await asked(reader, writer, request))
                    if outcomes[-1].status <= 0:
                        break
        except OSError:
            await asyncio.sleep(0.05)
    return outcomes
