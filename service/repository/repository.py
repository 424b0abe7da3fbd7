"""The models that are served, and the folder that they come from."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from service.contract.files import check_files
from service.errors import NotReady, StartError, UnknownModel, quoted
from service.repository.defaults import Defaults, default_models, is_visible, model_names
from service.repository.overrides import WHOLE, Overrides
from service.repository.progress import Tell, logged
from service.repository.selection import Selection, version_key
from service.repository.version import LoadRules, open_model, read_manifest, start_errors
from service.runtime.model import Model

State = Literal["ready", "loading", "unloaded", "failed"]
Stamp = tuple[tuple[str, int, int], ...]
"""Name, size and modification time of every file of a version."""

log = logging.getLogger(__name__)


class Condition(NamedTuple):
    """State of a version.

    Attributes:
        state: The state.
        reason: The reason for it; of a version that is loading, the step.
        stamp: That of the files when the version failed.
        began: Time of the monotonic clock at which it began to load, in seconds.
    """

    state: State
    reason: str = ""
    stamp: Stamp = ()
    began: float = 0.0

    @property
    def told(self) -> str:
        """The reason; of a version that is loading, with the time since it began."""
        return (
            f"{self.reason}, {time.monotonic() - self.began:.0f} s so far" if self.state == "loading" else self.reason
        )


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a model repository, the versions of it that are selected, how one is opened, and who signs them."""

    path: Path
    selection: Selection
    open: Callable[[Path, Tell], Model]
    public_keys: str = ""

    def names(self) -> list[str]:
        """Return the models that have a version; hidden folders are left out."""
        return model_names(self.path)

    def versions(self, model: str) -> set[str]:
        """Return the versions of a model."""
        return {path.name for path in (self.path / model).glob("*/") if is_visible(path)}

    def stamp(self, model: str, version: str) -> Stamp:
        """Return what changes with any file of a version."""
        try:
            files = [(path.name, path.stat()) for path in (self.path / model / version).iterdir()]
        except OSError:
            return ()
        return tuple(sorted((name, found.st_size, found.st_mtime_ns) for name, found in files))

    def differs(self, model: Model) -> bool:
        """Whether the folder holds another version under the same number.

        Raises:
            StartError: It cannot be read, its signature is not valid, or its files are not as its manifest says.
        """
        folder = self.path / model.manifest.name / model.manifest.version
        _, manifest = read_manifest(folder, self.public_keys)
        if manifest != model.manifest:
            return True
        with start_errors():
            check_files(folder, manifest)
        return False

    def reason(self, error: StartError) -> str:
        """Return an error on one line, without the path of this folder."""
        return " ".join(str(error).replace(f"{self.path}/", "").split())


class Repository:
    """The models that are served, and the condition of every version that is known.

    `models` and `conditions` are replaced as a whole, never altered, so any thread may read them while one thread at a
    time calls `update`. A request keeps the model that it found.

    Args:
        models: Models by name and version.
        default: The default models, as text; see `Defaults`.
        folder: The folder to load further versions from.
    """

    def __init__(self, models: dict[str, dict[str, Model]], default: str, folder: ModelFolder | None = None) -> None:
        self.models = models
        self.defaults = Defaults.parse(default) if default else Defaults("")
        self.conditions: Mapping[str, Mapping[str, Condition]] = {
            name: dict.fromkeys(versions, Condition("ready")) for name, versions in models.items()
        }
        self._folder = folder

    @classmethod
    def open(
        cls,
        folder: Path,
        default: str,
        provider: str,
        threads: int,
        max_rows: int,
        selection: Selection = Selection(),  # noqa: B008  # frozen
        overrides: Overrides = Overrides(),  # noqa: B008  # a tuple
        rules: LoadRules = LoadRules(),  # noqa: B008  # a tuple
    ) -> Repository:
        """Load the versions of a folder; those that fail are logged, and the others serve.

        Args:
            folder: Folder of <model>/<version>/manifest.json.
            default: The default models, as text; see `default_models`.
            provider: onnxruntime's name of the execution provider.
            threads: Threads of a graph.
            max_rows: Rows of a batch, for the warm-up.
            selection: The versions to load.
            overrides: Loads and unloads on top of the selection.
            rules: What a version must keep to.

        Raises:
            StartError: In one line: there is no default model, or no version of one can be served.
        """
        opened = ModelFolder(
            folder,
            selection,
            lambda path, tell: open_model(path, provider, threads, max_rows, rules, tell),
            rules.public_keys,
        )
        defaults, names = default_models(folder, selection, default), opened.names()
        repository = cls({}, str(defaults), opened)
        for name in names:
            repository.update(name, overrides)
        for name in defaults.models:
            refused = repository.refused(name)
            if refused and name not in repository.models:
                raise StartError(next(iter(refused.values())))
        for name in names:
            repository.log_refused(name)
        return repository

    def find(self, name: str | None, version: str | None, operation: str = "") -> Model:
        """Return a model.

        Args:
            name: Its name; None is the default model.
            version: Its version; None is the latest that is served.
            operation: The operation whose default model is meant.

        Raises:
            UnknownModel: There is none.
            NotReady: No version of the model is served.
        """
        name = self.defaults.of(operation) if name is None else name
        versions = self.models.get(name)
        if versions is None:
            raise self._missing(name)
        if version is None:
            return next(reversed(versions.values()))
        if version not in versions:
            raise UnknownModel(f"model {name} has no version {quoted(version)}; it has {', '.join(versions)}")
        return versions[version]

    def refused(self, name: str) -> dict[str, str]:
        """Return the versions of a model that cannot be served as the folder has them, and the reason for each."""
        known = self.conditions.get(name, {}).items()
        return {
            version: found.reason
            for version, found in known
            if found.reason and found.state not in ("unloaded", "loading")
        }

    def loading(self, name: str) -> dict[str, str]:
        """Return the versions of a model that are loading, and the step that each is at."""
        known = self.conditions.get(name, {}).items()
        return {version: found.told for version, found in known if found.state == "loading"}

    def log_refused(self, name: str) -> None:
        """Log the versions of a model that cannot be served."""
        for version, reason in self.refused(name).items():
            log.warning("model %s version %s: %s", name, version, reason)

    def check_known(self, name: str, version: str) -> None:
        """Refuse a version that is neither in the folder nor served, so that no name of a caller becomes a path.

        Raises:
            UnknownModel: It is refused.
        """
        assert self._folder is not None
        names = {*self._folder.names(), *self.conditions}
        if name not in names:
            raise UnknownModel(f"no model {quoted(name)}; the models are {', '.join(sorted(names))}")
        versions = {*self._folder.versions(name), *self.conditions.get(name, {})}
        if version not in {*versions, WHOLE}:
            known = ", ".join(sorted(versions, key=version_key))
            raise UnknownModel(f"model {name} has no version {quoted(version)}; its folder holds {known}")

    def changes(self) -> dict[str, set[str]]:
        """Return the models that have new versions, or failed versions with new files, which it gives by model."""
        assert self._folder is not None
        changes = {}
        for name in self._folder.names():
            known, found = self.conditions.get(name, {}), self._folder.versions(name)
            changed = {v for v in found & known.keys() if self._has_changed(name, v, known[v])}
            if changed or found - known.keys():
                changes[name] = changed
        return changes

    def update(self, name: str, overrides: Overrides, again: Collection[str] = ()) -> None:
        """Load and unload versions of a model, by the selection and the overrides. Blocks while versions load.

        Requests get the new versions once all of them are loaded. A version that fails is left out, and versions that
        are served stay.

        Args:
            name: Name of the model.
            overrides: Loads and unloads on top of the selection.
            again: Versions to load again although they are served or have failed; `WHOLE` is all.
        """
        folder = self._folder
        assert folder is not None
        served, found = dict(self.models.get(name, {})), folder.versions(name)
        anew = found | served.keys() if WHOLE in again else set(again)
        conditions = {v: known for v, known in self.conditions.get(name, {}).items() if v in found or v in served}
        failed = {v for v, known in conditions.items() if known.state == "failed"} - anew
        failed = {version for version in failed if not overrides.is_unloaded(name, version)}
        for version in served.keys() & anew:
            self._reload(name, version, served, conditions)
        while missing := overrides.wanted(folder.selection, name, found | served.keys(), failed) - served.keys():
            for version in sorted(missing, key=version_key):
                model = self._load(name, version, conditions)
                if model is None:
                    failed.add(version)
                else:
                    served[version] = model
        wanted = overrides.wanted(folder.selection, name, found | served.keys(), failed)
        for version in (found | served.keys()) - wanted - failed:
            by_request = overrides.is_unloaded(name, version)
            reason = "unloaded by request" if by_request else f"VAE_VERSIONS is {folder.selection.text}"
            conditions[version] = Condition("unloaded", reason)
        self._serve(name, {version: served[version] for version in sorted(wanted, key=version_key)})
        self._set_conditions(name, conditions)

    def _load(self, name: str, version: str, conditions: dict[str, Condition]) -> Model | None:
        """Open a version and set its condition; None where it fails."""
        folder = self._folder
        assert folder is not None
        stamp = folder.stamp(name, version)
        try:
            model = self._open(name, version, conditions)
        except StartError as error:
            conditions[version] = Condition("failed", folder.reason(error), stamp)
            return None
        conditions[version] = Condition("ready")
        return model

    def _open(self, name: str, version: str, conditions: Mapping[str, Condition]) -> Model:
        """Open a version, and show in the conditions and the log how far it is.

        Raises:
            StartError: It cannot be served.
        """
        folder, began = self._folder, time.monotonic()
        assert folder is not None

        def tell(step: str) -> None:
            self._set_conditions(name, {**conditions, version: Condition("loading", step, began=began)})

        tell("starting")
        with logged(lambda: f"model {name} version {version} is loading: {self.conditions[name][version].told}"):
            return folder.open(folder.path / name / version, tell)

    def _reload(self, name: str, version: str, served: dict[str, Model], conditions: dict[str, Condition]) -> None:
        """Replace a served version by what the folder holds under the same number; it stays where that fails."""
        folder = self._folder
        assert folder is not None
        try:
            if folder.differs(served[version]):
                served[version] = self._open(name, version, conditions)
            conditions[version] = Condition("ready")
        except StartError as error:
            conditions[version] = Condition("ready", f"what lies in the folder now is refused: {folder.reason(error)}")

    def _serve(self, name: str, versions: dict[str, Model]) -> None:
        others = {other: served for other, served in self.models.items() if other != name}
        self.models = dict(sorted({**others, name: versions}.items())) if versions else others

    def _set_conditions(self, name: str, conditions: Mapping[str, Condition]) -> None:
        ordered = dict(sorted(conditions.items(), key=lambda item: version_key(item[0])))
        self.conditions = dict(sorted({**self.conditions, name: ordered}.items()))

    def _has_changed(self, name: str, version: str, known: Condition) -> bool:
        assert self._folder is not None
        return known.state == "failed" and known.stamp != self._folder.stamp(name, version)

    def _missing(self, name: str) -> UnknownModel | NotReady:
        if name not in self.conditions:
            return UnknownModel(f"no model {quoted(name)}; the models are {', '.join(self.models)}")
        return NotReady(f"no version of model {name} is served; /v1/models/{name} says why")
