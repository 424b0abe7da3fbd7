"""What operators asked for on top of VAE_VERSIONS, and how far each worker has come with it.

Of several workers, one takes an order; the others find it in a folder that they share, and so does one that is started
in the place of another. A single process keeps it in memory.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from service.errors import NoRoom
from service.repository.selection import Selection

WHOLE = ""
"""In place of a version: the model, at whatever versions the setting chooses."""
FILE_NAME = "orders.json"


class Wish(NamedTuple):
    """The last order about a version; orders are numbered from 1."""

    loaded: bool
    number: int


class Standing(NamedTuple):
    """All orders that stand, by model and version, and the number of the last one."""

    number: int = 0
    wishes: Mapping[str, Mapping[str, Wish]] = {}

    def after(self, model: str, version: str, *, loaded: bool) -> Standing:
        """With one order more; one about a whole model takes the place of those about its versions."""
        number = self.number + 1
        earlier = {} if version == WHOLE else self.wishes.get(model, {})
        return Standing(number, {**self.wishes, model: {**earlier, version: Wish(loaded, number)}})

    def wanted(self, selection: Selection, model: str, found: AbstractSet[str], failed: AbstractSet[str]) -> set[str]:
        """The versions of a model to serve: of those found what the setting chooses, but for the orders.

        What has failed or was unloaded does not count: with `latest`, the version before takes its place.
        """
        wishes = self.wishes.get(model, {})
        out = failed | {version for version, wish in wishes.items() if not wish.loaded}
        chosen = set() if WHOLE in out else selection.chosen(model, found - out)
        return (chosen | wishes.keys()) - out - {WHOLE}

    def is_unloaded(self, model: str, version: str) -> bool:
        """Whether an order, not the setting, keeps it out."""
        wishes = self.wishes.get(model, {})
        wish = wishes.get(version, wishes.get(WHOLE))
        return wish is not None and not wish.loaded

    def news(self, since: int) -> dict[str, set[str]]:
        """Models that orders after that number are about, with the versions that are to be looked at anew."""
        fresh = {
            model: {version: wish for version, wish in wishes.items() if wish.number > since}
            for model, wishes in self.wishes.items()
        }
        return {model: {v for v, wish in wishes.items() if wish.loaded} for model, wishes in fresh.items() if wishes}


class Report(NamedTuple):
    """How far a worker has come: the last order it followed, and (state, reason) by model and version."""

    followed: int
    conditions: Mapping[str, Mapping[str, tuple[str, str]]]


class Orders:
    """Orders and reports, in a folder (None: in memory)."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._standing = Standing()
        self._report = Report(0, {})

    def read(self) -> Standing:
        """As they stand now."""
        if self._folder is None:
            return self._standing
        try:
            content = json.loads((self._folder / FILE_NAME).read_bytes())
        except FileNotFoundError:
            return Standing()
        wishes = {
            model: {version: Wish(*wish) for version, wish in versions.items()}
            for model, versions in content["wishes"].items()
        }
        return Standing(content["number"], wishes)

    def give(self, model: str, version: str, *, loaded: bool) -> int:
        """Give one order more; its number."""
        with self._alone():
            self._standing = self.read().after(model, version, loaded=loaded)
            if self._folder is not None:
                _replace(self._folder / FILE_NAME, self._standing._asdict())
            return self._standing.number

    def report(self, report: Report) -> None:
        """Tell the others how far this worker is."""
        self._report = report
        if self._folder is not None:
            _replace(self._folder / f"worker-{os.getpid()}.json", report._asdict())

    def reports(self) -> list[Report]:
        """Of every worker that lives."""
        if self._folder is None:
            return [self._report]
        paths = [path for path in self._folder.glob("worker-*.json") if _lives(path)]
        return [Report(**json.loads(path.read_bytes())) for path in paths]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other worker gives an order."""
        if self._folder is None:
            yield
            return
        with (self._folder / "orders.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _replace(path: Path, content: object) -> None:
    """A file is there as a whole or as it was.

    Raises:
        NoRoom: It cannot be written.
    """
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        draft.write_text(json.dumps(content))
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise NoRoom(
            f"what the workers share cannot be written ({error.strerror}); make room in the temporary folder"
        ) from error


def _lives(path: Path) -> bool:
    return Path(f"/proc/{path.stem.rpartition('-')[2]}").exists()
