"""Loads and unloads that operators requested on top of VAE_VERSIONS, and how far each worker has applied them.

Of several workers, one takes a request. The others, and workers that are started later, find it in a folder that they
share. A single process keeps it in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from service.errors import NoRoom
from service.repository.files import locked, replace
from service.repository.selection import Selection

WHOLE = ""
"""In place of a version: the whole model, at the versions that the setting selects."""
FILE_NAME = "overrides.json"


class Override(NamedTuple):
    """The last request about a version: to load or to unload it. Requests are numbered from 1."""

    loaded: bool
    number: int


class Overrides(NamedTuple):
    """All overrides, by model and version, and the number of the last request."""

    number: int = 0
    models: Mapping[str, Mapping[str, Override]] = {}

    def after(self, model: str, version: str, *, loaded: bool) -> Overrides:
        """Return these with one more; one about a whole model replaces those about its versions."""
        number = self.number + 1
        earlier = {} if version == WHOLE else self.models.get(model, {})
        return Overrides(number, {**self.models, model: {**earlier, version: Override(loaded, number)}})

    def wanted(self, selection: Selection, model: str, found: AbstractSet[str], failed: AbstractSet[str]) -> set[str]:
        """Return the versions of a model to serve: those that the setting selects, changed by the overrides.

        Versions that failed or were unloaded do not count: with `latest`, the version before takes their place.

        Args:
            selection: The setting.
            model: Name of the model.
            found: Its versions in the folder.
            failed: Those that cannot be served.
        """
        overrides = self.models.get(model, {})
        out = failed | {version for version, override in overrides.items() if not override.loaded}
        chosen = set() if WHOLE in out else selection.chosen(model, found - out)
        return (chosen | overrides.keys()) - out - {WHOLE}

    def is_unloaded(self, model: str, version: str) -> bool:
        """Whether a version is unloaded by request."""
        overrides = self.models.get(model, {})
        override = overrides.get(version, overrides.get(WHOLE))
        return override is not None and not override.loaded

    def since(self, number: int) -> dict[str, set[str]]:
        """Return the models of later requests, each with the versions to load again."""
        later = {
            model: {version: override for version, override in overrides.items() if override.number > number}
            for model, overrides in self.models.items()
        }
        return {model: {v for v, override in of.items() if override.loaded} for model, of in later.items() if of}


class Report(NamedTuple):
    """How far a worker is: the number of the last request it applied, and (state, reason) by model and version."""

    applied: int
    conditions: Mapping[str, Mapping[str, tuple[str, str]]]


class SharedState:
    """Overrides, and a report of each worker.

    Args:
        folder: Folder of the workers; None keeps the state in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._overrides = Overrides()
        self._report = Report(0, {})

    def overrides(self) -> Overrides:
        """Return the overrides."""
        if self._folder is None:
            return self._overrides
        try:
            content = json.loads((self._folder / FILE_NAME).read_bytes())
        except FileNotFoundError:
            return Overrides()
        models = {
            model: {version: Override(*override) for version, override in versions.items()}
            for model, versions in content["models"].items()
        }
        return Overrides(content["number"], models)

    def add(self, model: str, version: str, *, loaded: bool) -> int:
        """Add an override; returns its number.

        Raises:
            NoRoom: It cannot be written.
        """
        with nullcontext() if self._folder is None else locked(self._folder / "overrides.lock"):
            self._overrides = self.overrides().after(model, version, loaded=loaded)
            self._write(FILE_NAME, self._overrides)
            return self._overrides.number

    def report(self, report: Report) -> None:
        """Write the report of this worker.

        Raises:
            NoRoom: It cannot be written.
        """
        self._report = report
        self._write(f"worker-{os.getpid()}.json", report)

    def reports(self) -> list[Report]:
        """Return the reports of all workers that are alive."""
        if self._folder is None:
            return [self._report]
        paths = [path for path in self._folder.glob("worker-*.json") if _is_alive(path)]
        return [Report(**json.loads(path.read_bytes())) for path in paths]

    def _write(self, name: str, content: Overrides | Report) -> None:
        if self._folder is None:
            return
        try:
            replace(self._folder / name, json.dumps(content._asdict()).encode())
        except OSError as error:
            raise NoRoom(
                f"what the workers share cannot be written ({error.strerror}); make room in the temporary folder"
            ) from error


def _is_alive(path: Path) -> bool:
    return Path(f"/proc/{path.stem.rpartition('-')[2]}").exists()
