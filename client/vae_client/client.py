"""`Client` and `AsyncClient`: two thin drivers of the same requests."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

import httpx

from vae_client.answer import Answer, answer_of, json_of
from vae_client.batch import Report, Source, run_batch
from vae_client.call import Call
from vae_client.errors import InvalidRequest, NoAddress
from vae_client.events import Event, Reader, streaming
from vae_client.exchange import FAILURES, Attempt, Outcome, Pause, Received, Retries, Steps, broken_off, exchange
from vae_client.operations import Administration, Operations
from vae_client.version import VERSION

URL_VARIABLE, KEY_VARIABLE = "VAE_CLIENT_URL", "VAE_CLIENT_KEY"
TIMEOUT_S = 120.0
"""Seconds for an answer, unless the caller says otherwise: the service's own default."""
STREAM_TIMEOUT_S = 600.0
"""The same for a stream of events."""
KEEP_ALIVE_S = 4.0
"""How long a connection is kept for the next call: less than the service's own `VAE_KEEP_ALIVE_S` of 5."""
LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")
"""Addresses that no proxy of the environment is asked for."""
Verify = ssl.SSLContext | bool
T = TypeVar("T")
Later: TypeAlias = Coroutine[Any, Any, T]
"""A result that is awaited."""


class Access(NamedTuple):
    """Which service is asked, and how.

    Attributes:
        url: Its address.
        key: API key; empty without.
        timeout_s: Seconds for an answer; None is `TIMEOUT_S`, and `STREAM_TIMEOUT_S` for a stream.
        retries: When a call that failed is made again.
        verify: Whether certificates are checked, or how.
    """

    url: str
    key: str
    timeout_s: float | None
    retries: Retries
    verify: Verify

    @classmethod
    def of(cls, url: str | None, key: str | None, *further: Any) -> Access:
        """Take what is not named from the environment.

        Raises:
            NoAddress: No address is named.
            InvalidRequest: It is no address, or the key is none.
        """
        url = url or os.environ.get(URL_VARIABLE, "")
        if not url:
            raise NoAddress(
                f"which service? name it with url= (--url) or in {URL_VARIABLE}, or start one on this machine with "
                "vae_client.local.started() (--local)"
            )
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(f"the address {url!r} has no scheme; write http://{url} or https://{url}")
        try:
            httpx.URL(url)
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"{url!r} is no address ({error}); write one such as http://127.0.0.1:8000") from error
        key = os.environ.get(KEY_VARIABLE, "") if key is None else key
        if not key.isprintable():
            raise InvalidRequest(f"the API key has a line break or the like; write it into {KEY_VARIABLE} (key=) alone")
        return cls(url, key, *further)

    def options(self) -> dict[str, Any]:
        """Arguments of httpx's clients."""
        headers = {b"user-agent": f"vae-client/{VERSION}".encode()}
        if self.key:
            headers[b"authorization"] = f"Bearer {self.key}".encode()
        limits = httpx.Limits(keepalive_expiry=KEEP_ALIVE_S)
        url, direct = f"{self.url.rstrip('/')}/", dict.fromkeys(LOOPBACK)
        return {"base_url": url, "headers": headers, "verify": self.verify, "limits": limits, "mounts": direct}

    def exchange(self, call: Call, usual_s: float = TIMEOUT_S) -> Steps:
        """The steps of a call."""
        return exchange(call, self.retries, usual_s if self.timeout_s is None else self.timeout_s, self.url)


class Asking(ABC):
    """What both clients are made with; its arguments are described at `Client`."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout_s: float | None = None,
        retries: Retries = Retries(),  # noqa: B008  # frozen
        verify: Verify = True,
    ) -> None:
        self._access = Access.of(url, key, timeout_s, retries, verify)
        self._open(self._access.options())

    @abstractmethod
    def _open(self, options: dict[str, Any]) -> None:
        """Make the connections, with arguments of httpx's clients."""


class Client(Asking, Operations[Answer], Administration[dict[str, Any], str]):
    """A client whose calls return when their answer is there. Threads may share it.

    Args:
        url: Address of the service; by default VAE_CLIENT_URL.
        key: API key; by default VAE_CLIENT_KEY, if that is set.
        timeout_s: Seconds for an answer, retries included; by default 120, and 600 for a stream. The service is told.
        retries: When a call that failed is made again.
        verify: Certificates to trust, as an `ssl.SSLContext`; False trusts all.

    Raises:
        NoAddress: No address is named.
        InvalidRequest: The address or the key is none.
    """

    def _open(self, options: dict[str, Any]) -> None:
        self._http = httpx.Client(**options)
        self.stream = Stream(self._events)

    def map(
        self, operation: str, source: Source, out: str | os.PathLike[str], *, concurrency: int = 4, **options: Any
    ) -> Report:
        """Run an operation on many images; see `AsyncClient.map`."""

        async def run() -> Report:
            async with AsyncClient(**self._access._asdict()) as client:
                return await client.map(operation, source, out, concurrency=concurrency, **options)

        return run_to_end(run())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def perform(self, call: Call) -> Answer:
        """Send the request of an operation; return its answer."""
        received = self._drive(self._access.exchange(call), self._attempt)
        return answer_of(received.headers, received.content)

    def _json(self, call: Call) -> dict[str, Any]:
        return json_of(self._drive(self._access.exchange(call), self._attempt).content)

    def _text(self, call: Call) -> str:
        return self._drive(self._access.exchange(call), self._attempt).content.decode()

    @staticmethod
    def _drive(steps: Steps, attempt: Callable[[Attempt], Outcome]) -> Received:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as done:
                return done.value
            outcome = None
            if isinstance(step, Pause):
                time.sleep(step.seconds)
            else:
                outcome = attempt(step)

    def _opened(self, attempt: Attempt) -> httpx.Response:
        return self._http.send(self._http.build_request(**attempt.arguments()), stream=True)

    def _attempt(self, attempt: Attempt) -> Outcome:
        try:
            response = self._opened(attempt)
            return self._whole(attempt, response)
        except FAILURES as error:
            return error

    @staticmethod
    def _whole(attempt: Attempt, response: httpx.Response) -> Received:
        content = bytearray()
        try:
            for part in response.iter_bytes():
                attempt.check_time()
                content += part
        finally:
            response.close()
        return Received(response.status_code, response.headers, bytes(content))

    def _events(self, call: Call) -> Iterator[Event]:
        opened: list[tuple[Attempt, httpx.Response]] = []

        def attempt(one: Attempt) -> Outcome:
            try:
                response = self._opened(one)
                if not response.is_success:
                    return self._whole(one, response)
            except FAILURES as error:
                return error
            opened.append((one, response))
            return Received(response.status_code, response.headers)

        self._drive(self._access.exchange(call, STREAM_TIMEOUT_S), attempt)
        ((last, response),), reader = opened, Reader()
        try:
            for line in response.iter_lines():
                last.check_time()
                event = reader.read(line)
                if event is not None:
                    yield event
        except httpx.HTTPError as error:
            raise broken_off(error) from error
        finally:
            response.close()
        reader.finish()


class AsyncClient(Asking, Operations[Later[Answer]], Administration[Later[dict[str, Any]], Later[str]]):
    """A client whose calls are awaited. It takes the arguments of `Client`."""

    def _open(self, options: dict[str, Any]) -> None:
        self._http = httpx.AsyncClient(**options)
        self.stream = AsyncStream(self._events)

    async def map(
        self, operation: str, source: Source, out: str | os.PathLike[str], *, concurrency: int = 4, **options: Any
    ) -> Report:
        """Run an operation on many images, a few at a time, and write what comes of each.

        What is written is not computed again, unless the file that it was made of is newer: the same call continues
        where the last one ended, however it ended. The model is looked up once; a version that takes its place
        meanwhile is refused.

        Args:
            operation: Name of the operation.
            source: A folder of pictures and .npy files, a list of such files, or an array of rows.
            out: A folder for a file an item; or .npz, .npy, .csv or .parquet, a table of all.
            concurrency: Most requests at a time.
            **options: Options of the operation, with `seed` for all items together: each has one of its own, made of
                it and the item's name. Also `model`, `version`, `timeout_s`, `accept` of the files in a folder,
                `rows` of an array in one request (16), and `progress`: whether to show a bar, by default on a terminal.

        Returns:
            What was done, what was done before, and what failed.

        Raises:
            OtherRun: The results that are there are of another call.
            ClientError: No item can succeed: no service, no right, a wrong option.
        """
        return await run_batch(self, operation, source, Path(out), concurrency, options)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def perform(self, call: Call) -> Answer:
        """Send the request of an operation; return its answer."""
        received = await self._drive(self._access.exchange(call), self._attempt)
        return answer_of(received.headers, received.content)

    async def _json(self, call: Call) -> dict[str, Any]:
        return json_of((await self._drive(self._access.exchange(call), self._attempt)).content)

    async def _text(self, call: Call) -> str:
        return (await self._drive(self._access.exchange(call), self._attempt)).content.decode()

    @staticmethod
    async def _drive(steps: Steps, attempt: Callable[[Attempt], Awaitable[Outcome]]) -> Received:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as done:
                return done.value
            outcome = None
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
            else:
                outcome = await attempt(step)

    async def _opened(self, attempt: Attempt) -> httpx.Response:
        return await self._http.send(self._http.build_request(**attempt.arguments()), stream=True)

    async def _attempt(self, attempt: Attempt) -> Outcome:
        try:
            response = await self._opened(attempt)
            return await self._whole(attempt, response)
        except FAILURES as error:
            return error

    @staticmethod
    async def _whole(attempt: Attempt, response: httpx.Response) -> Received:
        content = bytearray()
        try:
            async for part in response.aiter_bytes():
                attempt.check_time()
                content += part
        finally:
            await response.aclose()
        return Received(response.status_code, response.headers, bytes(content))

    async def _events(self, call: Call) -> AsyncIterator[Event]:
        opened: list[tuple[Attempt, httpx.Response]] = []

        async def attempt(one: Attempt) -> Outcome:
            try:
                response = await self._opened(one)
                if not response.is_success:
                    return await self._whole(one, response)
            except FAILURES as error:
                return error
            opened.append((one, response))
            return Received(response.status_code, response.headers)

        await self._drive(self._access.exchange(call, STREAM_TIMEOUT_S), attempt)
        ((last, response),), reader = opened, Reader()
        try:
            async for line in response.aiter_lines():
                last.check_time()
                event = reader.read(line)
                if event is not None:
                    yield event
        except httpx.HTTPError as error:
            raise broken_off(error) from error
        finally:
            await response.aclose()
        reader.finish()


def run_to_end(work: Coroutine[Any, Any, Report]) -> Report:
    """Run a coroutine, in a thread of its own where this one has an event loop already, as in a notebook."""
    if not running():
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def running() -> bool:
    """Whether this thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Stream(Operations[Iterator[Event]]):
    """The operations of a client, each an iterator of its progress and at last its answer."""

    def __init__(self, send: Callable[[Call], Iterator[Event]]) -> None:
        self._send = send

    def perform(self, call: Call) -> Iterator[Event]:
        """Send the request of an operation; give its events."""
        return self._send(streaming(call))


class AsyncStream(Operations[AsyncIterator[Event]]):
    """The same of an `AsyncClient`, for `async for`."""

    def __init__(self, send: Callable[[Call], AsyncIterator[Event]]) -> None:
        self._send = send

    def perform(self, call: Call) -> AsyncIterator[Event]:
        """Send the request of an operation; give its events."""
        return self._send(streaming(call))
