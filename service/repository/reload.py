"""Load, unload and poll: changes of the served models while the service runs, one at a time, in a thread."""

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
from service.repository.overrides import WHOLE, Overrides, Report, SharedState
from service.repository.repository import Repository
from service.runtime.thread import ComputingThreads
from service.settings import Settings

FOLLOW_S = 1.0
"""Interval at which a worker looks for requests that other workers took, in seconds."""
REPORT_S = 0.1
"""Interval at which the worker that took a request looks whether the others have applied it, in seconds."""

log = logging.getLogger(__name__)

Found = TypeVar("Found")


class Outcome(NamedTuple):
    """The number of workers, and of those that have applied a request so far."""

    workers: int
    followed: int


class Control:
    """Keeps a repository in step with the setting, the folder and the overrides.

    Args:
        repository: The models that this worker serves.
        shared: What the workers share.
        settings: The settings.
        observe: Called with (model, number of versions that are served) after each change.
    """

    def __init__(
        self, repository: Repository, shared: SharedState, settings: Settings, observe: Callable[[str, int], object]
    ) -> None:
        self._repository, self._shared, self._settings, self._observe = repository, shared, settings, observe
        self._lock = asyncio.Lock()
        self._thread = ComputingThreads("control")  # unlike the loop's executor, a process ends without it
        self._applied = 0
        self._count_ready()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow load and unload requests of other workers, and poll the folder, while the block runs.

        Does nothing where the settings enable neither.
        """
        settings = self._settings
        if not (settings.poll_s or (settings.model_control and settings.workers > 1)):
            yield
            return
        try:
            await self._in_thread(self._catch_up)
        except NoRoom as error:  # it serves all the same, and tries again while it runs
            log.error("%s", error)  # noqa: TRY400  # the message says all
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()

    async def change(self, model: str, version: str, *, loaded: bool) -> Outcome:
        """Load or unload a version, in this worker and, before this returns, in the others.

        Args:
            model: Name of the model.
            version: Its version; `WHOLE` is the whole model.
            loaded: Whether to load it.

        Raises:
            UnknownModel: There is no such version.
            LoadRefused: A worker cannot serve it.
            NoRoom: The request cannot be written for the other workers.
        """
        async with self._lock:
            number = await self._in_thread(partial(self._change, model, version, loaded))
        reports = await self._reports(number)
        applied = [report for report in reports if report.applied >= number]
        for report in applied if loaded else ():
            for of, (state, reason) in report.conditions.get(model, {}).items():
                if version in (WHOLE, of) and reason and state != "unloaded":
                    raise LoadRefused(f"version {of}: {reason}")
        return Outcome(self._settings.workers, len(applied))

    async def _in_thread(self, work: Callable[[], Found]) -> Found:
        return await asyncio.wrap_future(self._thread.submit(work))

    def _change(self, model: str, version: str, loaded: bool) -> int:
        """Try a request here first, so that one that fails never reaches the other workers; returns its number."""
        self._repository.check_known(model, version)
        overrides = self._shared.overrides().after(model, version, loaded=loaded)
        try:
            self._update(model, overrides, {version} if loaded else ())
        finally:
            self._report()
        refused = self._repository.refused(model)
        if loaded and version in refused:
            self._repository.log_refused(model)
            raise LoadRefused(f"version {version}: {refused[version]}")
        number = self._shared.add(model, version, loaded=loaded)
        if number == self._applied + 1:
            self._applied = number  # a moment ago
        self._catch_up()
        log.info("model %s version %s: %s", model, version or "(all)", "loaded" if loaded else "unloaded")
        return number

    async def _reports(self, number: int) -> list[Report]:
        """The reports of all workers, once each has applied the request or the time of a request is up."""
        end = time.monotonic() + self._settings.timeout_s
        while True:
            reports = await asyncio.to_thread(self._shared.reports)
            if all(report.applied >= number for report in reports) or time.monotonic() > end:
                return reports
            await asyncio.sleep(REPORT_S)

    async def _follow(self) -> None:
        poll_s = self._settings.poll_s
        polled = time.monotonic()
        while True:
            await asyncio.sleep(min(FOLLOW_S, poll_s or FOLLOW_S))
            due = bool(poll_s) and time.monotonic() >= polled + poll_s
            polled = time.monotonic() if due else polled
            async with self._lock:
                try:
                    await self._in_thread(self._poll if due else self._catch_up)
                except Exception:
                    log.exception("what is served could not be brought up to date; it is tried again")

    def _poll(self) -> None:
        overrides = self._shared.overrides()
        for model, again in self._repository.changes().items():
            self._update(model, overrides, again)
            self._repository.log_refused(model)
        self._catch_up()

    def _catch_up(self) -> None:
        """Apply the requests that other workers have taken, and report it."""
        overrides = self._shared.overrides()
        for model, again in overrides.since(self._applied).items():
            self._update(model, overrides, again)
            self._repository.log_refused(model)
        self._applied = overrides.number
        self._report()

    def _update(self, model: str, overrides: Overrides, again: Collection[str]) -> None:
        self._repository.update(model, overrides, again)
        trim_heap()

    def _report(self) -> None:
        conditions: dict[str, dict[str, tuple[str, str]]] = {
            model: {version: (known.state, known.reason) for version, known in versions.items()}
            for model, versions in self._repository.conditions.items()
        }
        self._shared.report(Report(self._applied, conditions))
        self._count_ready()

    def _count_ready(self) -> None:
        for model in self._repository.conditions:
            self._observe(model, len(self._repository.models.get(model, ())))
