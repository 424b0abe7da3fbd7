"""Changes to what is served: loads, unloads, and what the folder brings; one at a time, in a thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple, TypeVar

from service.errors import LoadRefused, NoRoom
from service.process import trim_heap
from service.repository.overrides import WHOLE, Orders, Report, Standing
from service.repository.repository import Repository
from service.runtime.thread import ComputingThreads
from service.settings import Settings

FOLLOW_S = 1.0
"""How often a worker looks for orders that others took."""
ROLL_CALL_S = 0.1
"""How often the worker that took one looks whether the others have followed."""

log = logging.getLogger(__name__)

Found = TypeVar("Found")


class Outcome(NamedTuple):
    """How many workers there should be, and how many have followed an order so far."""

    workers: int
    followed: int


class Control:
    """Keeps a repository as the setting, the folder and the orders want it.

    observe: called with (model, number of versions that are served) after each change.
    """

    def __init__(
        self, repository: Repository, orders: Orders, settings: Settings, observe: Callable[[str, int], object]
    ) -> None:
        self._repository, self._orders, self._settings, self._observe = repository, orders, settings, observe
        self._lock = asyncio.Lock()
        self._thread = ComputingThreads("control")  # not the loop's executor, which an ending process waits for
        self._followed = 0
        self._count_ready()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow other workers' orders and poll the folder for as long as the block runs, where settings ask for it."""
        settings = self._settings
        if not (settings.poll_s or (settings.model_control and settings.workers > 1)):
            yield
            return
        try:
            await self._beside(self._catch_up)
        except NoRoom as error:  # it can serve all the same, and tries again as long as it runs
            log.error("%s", error)  # noqa: TRY400  # the message says all
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()

    async def order(self, model: str, version: str, *, loaded: bool) -> Outcome:
        """Load or unload a version, or a model (WHOLE): here at once, in the other workers before this returns.

        Raises: UnknownModel; LoadRefused where a version cannot be served, in this worker or in another.
        """
        async with self._lock:
            number = await self._beside(partial(self._obey, model, version, loaded))
        reports = await self._roll_call(number)
        followed = [report for report in reports if report.followed >= number]
        for report in followed if loaded else ():
            for of, (state, reason) in report.conditions.get(model, {}).items():
                if version in (WHOLE, of) and reason and state != "unloaded":
                    raise LoadRefused(f"version {of}: {reason}")
        return Outcome(self._settings.workers, len(followed))

    async def _beside(self, work: Callable[[], Found]) -> Found:
        """What `work` returns, computed beside the event loop; a process that ends does not wait for it."""
        return await asyncio.wrap_future(self._thread.submit(work))

    def _obey(self, model: str, version: str, loaded: bool) -> int:
        """Try it, then make it an order: one that cannot be followed never reaches the others. The order's number."""
        self._repository.check_known(model, version)
        standing = self._orders.read().after(model, version, loaded=loaded)
        try:
            self._settle(model, standing, {version} if loaded else ())
        finally:
            self._tell()
        refused = self._repository.refused(model)
        if loaded and version in refused:
            self._repository.log_refused(model)
            raise LoadRefused(f"version {version}: {refused[version]}")
        number = self._orders.give(model, version, loaded=loaded)
        if number == self._followed + 1:
            self._followed = number  # done already, a moment ago
        self._catch_up()
        log.info("model %s version %s: %s", model, version or "(all)", "loaded" if loaded else "unloaded")
        return number

    async def _roll_call(self, number: int) -> list[Report]:
        """What every worker says once it has followed, or the time of a request is up."""
        end = time.monotonic() + self._settings.timeout_s
        while True:
            reports = await asyncio.to_thread(self._orders.reports)
            if all(report.followed >= number for report in reports) or time.monotonic() > end:
                return reports
            await asyncio.sleep(ROLL_CALL_S)

    async def _follow(self) -> None:
        poll_s = self._settings.poll_s
        polled = time.monotonic()
        while True:
            await asyncio.sleep(min(FOLLOW_S, poll_s or FOLLOW_S))
            due = bool(poll_s) and time.monotonic() >= polled + poll_s
            polled = time.monotonic() if due else polled
            async with self._lock:
                try:
                    await self._beside(self._poll if due else self._catch_up)
                except Exception:
                    log.exception("what is served could not be brought up to date; it is tried again")

    def _poll(self) -> None:
        standing = self._orders.read()
        for model, again in self._repository.news().items():
            self._settle(model, standing, again)
            self._repository.log_refused(model)
        self._catch_up()

    def _catch_up(self) -> None:
        """Follow the orders that have come since, and say how far that went."""
        standing = self._orders.read()
        for model, again in standing.news(self._followed).items():
            self._settle(model, standing, again)
            self._repository.log_refused(model)
        self._followed = standing.number
        self._tell()

    def _settle(self, model: str, standing: Standing, again: Collection[str]) -> None:
        self._repository.settle(model, standing, again)
        trim_heap()

    def _tell(self) -> None:
        conditions: dict[str, dict[str, tuple[str, str]]] = {
            model: {version: (known.state, known.reason) for version, known in versions.items()}
            for model, versions in self._repository.conditions.items()
        }
        self._orders.report(Report(self._followed, conditions))
        self._count_ready()

    def _count_ready(self) -> None:
        for model in self._repository.conditions:
            self._observe(model, len(self._repository.models.get(model, ())))
