"""models/ to served models: what is served now, how it is with every version, and how that changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from service.contract import manifest as manifests
from service.contract.manifest import ManifestError
from service.errors import NotReady, StartError, UnknownModel, quoted
from service.repository.overrides import WHOLE, Standing
from service.repository.selection import Selection, version_key
from service.repository.version import LoadLimits, check_files, open_model
from service.runtime.model import Model

State = Literal["ready", "loading", "unloaded", "failed"]
Stamp = tuple[tuple[str, int, int], ...]
"""Name, size and time of change of every file of a version."""

log = logging.getLogger(__name__)


class Condition(NamedTuple):
    """How it is with one version, and why. `stamp` tells whether the files of one that failed have changed since."""

    state: State
    reason: str = ""
    stamp: Stamp = ()


@dataclass(frozen=True)
class Library:
    """Where models lie, which of them are wanted, and how one is opened."""

    folder: Path
    selection: Selection
    open: Callable[[Path], Model]

    def names(self) -> list[str]:
        """Models that have a version; half-written ones are hidden."""
        return model_names(self.folder)

    def versions(self, model: str) -> set[str]:
        """Those that lie there now."""
        return {path.name for path in (self.folder / model).glob("*/") if _is_seen(path)}

    def stamp(self, model: str, version: str) -> Stamp:
        """Changes with any file of a version."""
        try:
            files = [(path.name, path.stat()) for path in (self.folder / model / version).iterdir()]
        except OSError:
            return ()
        return tuple(sorted((name, found.st_size, found.st_mtime_ns) for name, found in files))

    def differs(self, model: Model) -> bool:
        """Whether what lies there is another version under the same number.

        Raises: StartError where it cannot be read, or where its files are not as its manifest says.
        """
        folder = self.folder / model.manifest.name / model.manifest.version
        try:
            if manifests.read(folder) != model.manifest:
                return True
        except ManifestError as error:
            raise StartError(str(error)) from error
        check_files(folder, model.manifest)
        return False

    def reason(self, error: StartError) -> str:
        """What is wrong, on one line, without saying where on this machine."""
        return " ".join(str(error).replace(f"{self.folder}/", "").split())


class Repository:
    """The models that are served, by name and version, and how it is with every version that is known.

    What is served changes in one step: `models` and `conditions` are replaced as a whole, never altered, so that any
    thread may read them while one at a time calls `settle`. A request keeps the model that it found.
    """

    def __init__(self, models: dict[str, dict[str, Model]], default: str, library: Library | None = None) -> None:
        self.models = models
        self.default = default
        self.conditions: Mapping[str, Mapping[str, Condition]] = {
            name: dict.fromkeys(versions, Condition("ready")) for name, versions in models.items()
        }
        self._library = library

    @classmethod
    def open(
        cls,
        folder: Path,
        default: str,
        provider: str,
        threads: int,
        max_rows: int,
        selection: Selection = Selection(),  # noqa: B008  # frozen
        standing: Standing = Standing(),  # noqa: B008  # a tuple
        limits: LoadLimits = LoadLimits(),  # noqa: B008  # a tuple
    ) -> Repository:
        """Open what is wanted of what lies below `folder`; a version that fails is named in the log, others serve.

        Raises: StartError, in one line, as `default_model` does, and where no version of the default can be served.
        """
        library = Library(folder, selection, lambda path: open_model(path, provider, threads, max_rows, limits))
        default, names = default_model(folder, selection, default), library.names()
        repository = cls({}, default, library)
        for name in names:
            repository.settle(name, standing)
        refused = repository.refused(default)
        if refused and default not in repository.models:
            raise StartError(next(iter(refused.values())))
        for name in names:
            repository.log_refused(name)
        return repository

    def find(self, name: str | None, version: str | None) -> Model:
        """A model by name (None: the default) and version (None: the latest that is served).

        Raises: UnknownModel; NotReady for a model of which no version is served.
        """
        versions = self.models.get(self.default if name is None else name)
        if versions is None:
            raise self._missing(self.default if name is None else name)
        if version is None:
            return next(reversed(versions.values()))
        if version not in versions:
            raise UnknownModel(f"model {name} has no version {quoted(version)}; it has {', '.join(versions)}")
        return versions[version]

    def refused(self, name: str) -> dict[str, str]:
        """The versions of a model that could not be served as they lie in the folder, and why."""
        known = self.conditions.get(name, {}).items()
        return {version: found.reason for version, found in known if found.reason and found.state != "unloaded"}

    def log_refused(self, name: str) -> None:
        """Name them to the operator."""
        for version, reason in self.refused(name).items():
            log.warning("model %s version %s: %s", name, version, reason)

    def check_known(self, name: str, version: str) -> None:
        """Refuse a version, or a whole model, that neither lies in the folder nor is served: no name becomes a path.

        Raises: UnknownModel.
        """
        assert self._library is not None
        names = {*self._library.names(), *self.conditions}
        if name not in names:
            raise UnknownModel(f"no model {quoted(name)}; the models are {', '.join(sorted(names))}")
        versions = {*self._library.versions(name), *self.conditions.get(name, {})}
        if version not in {*versions, WHOLE}:
            known = ", ".join(sorted(versions, key=version_key))
            raise UnknownModel(f"model {name} has no version {quoted(version)}; its folder holds {known}")

    def news(self) -> dict[str, set[str]]:
        """Models whose folder holds something new: a version never seen, or files changed of one that failed."""
        assert self._library is not None
        news = {}
        for name in self._library.names():
            known, found = self.conditions.get(name, {}), self._library.versions(name)
            changed = {v for v in found & known.keys() if self._is_mended(name, v, known[v])}
            if changed or found - known.keys():
                news[name] = changed
        return news

    def settle(self, name: str, standing: Standing, again: Collection[str] = ()) -> None:
        """Serve of a model what is wanted of what lies in the folder. Blocks for as long as opening takes.

        Everything new is opened, replayed and warmed before any of it gets requests. What cannot be served is passed
        over, and what has been served stays. again: versions (WHOLE: all) to look at anew, though they are served or
        have failed.
        """
        library = self._library
        assert library is not None
        served, found = dict(self.models.get(name, {})), library.versions(name)
        anew = found | served.keys() if WHOLE in again else set(again)
        conditions = {v: known for v, known in self.conditions.get(name, {}).items() if v in found or v in served}
        failed = {v for v, known in conditions.items() if known.state == "failed"} - anew
        failed = {version for version in failed if not standing.is_unloaded(name, version)}
        for version in served.keys() & anew:
            self._renew(name, version, served, conditions)
        while missing := standing.wanted(library.selection, name, found | served.keys(), failed) - served.keys():
            for version in sorted(missing, key=version_key):
                model = self._open(name, version, conditions)
                if model is None:
                    failed.add(version)
                else:
                    served[version] = model
        wanted = standing.wanted(library.selection, name, found | served.keys(), failed)
        for version in (found | served.keys()) - wanted - failed:
            by_order = standing.is_unloaded(name, version)
            reason = "unloaded by request" if by_order else f"VAE_VERSIONS is {library.selection.text}"
            conditions[version] = Condition("unloaded", reason)
        self._serve(name, {version: served[version] for version in sorted(wanted, key=version_key)})
        self._note(name, conditions)

    def _open(self, name: str, version: str, conditions: dict[str, Condition]) -> Model | None:
        """One version, and how it went; None where it cannot be served."""
        library = self._library
        assert library is not None
        stamp = library.stamp(name, version)
        self._note(name, {**conditions, version: Condition("loading")})
        try:
            model = library.open(library.folder / name / version)
        except StartError as error:
            conditions[version] = Condition("failed", library.reason(error), stamp)
            return None
        conditions[version] = Condition("ready")
        return model

    def _renew(self, name: str, version: str, served: dict[str, Model], conditions: dict[str, Condition]) -> None:
        """Put what lies in the folder in the place of what is served under the same number, if it can be."""
        library = self._library
        assert library is not None
        try:
            if library.differs(served[version]):
                self._note(name, {**conditions, version: Condition("loading")})
                served[version] = library.open(library.folder / name / version)
            conditions[version] = Condition("ready")
        except StartError as error:
            conditions[version] = Condition("ready", f"what lies in the folder now is refused: {library.reason(error)}")

    def _serve(self, name: str, versions: dict[str, Model]) -> None:
        others = {other: served for other, served in self.models.items() if other != name}
        self.models = dict(sorted({**others, name: versions}.items())) if versions else others

    def _note(self, name: str, conditions: Mapping[str, Condition]) -> None:
        ordered = dict(sorted(conditions.items(), key=lambda item: version_key(item[0])))
        self.conditions = dict(sorted({**self.conditions, name: ordered}.items()))

    def _is_mended(self, name: str, version: str, known: Condition) -> bool:
        assert self._library is not None
        return known.state == "failed" and known.stamp != self._library.stamp(name, version)

    def _missing(self, name: str) -> UnknownModel | NotReady:
        if name not in self.conditions:
            return UnknownModel(f"no model {quoted(name)}; the models are {', '.join(self.models)}")
        return NotReady(f"no version of model {name} is served; /v1/models/{name} says why")


def model_names(folder: Path) -> list[str]:
    """Models below a folder that have a version; half-written ones are hidden."""
    return sorted({path.parent.name for path in folder.glob("*/*/") if _is_seen(path.parent, path)})


def default_model(folder: Path, selection: Selection, wanted: str) -> str:
    """The model that requests without a name mean: the one that is wanted, else the only one, else `default` names it.

    Raises: StartError for a missing or empty folder, an unknown default or none among several models, a selected model
        that is not there.
    """
    if not folder.is_dir():
        raise StartError(f"no model repository {folder.resolve()}; set VAE_MODELS, or train one")
    names = model_names(folder)
    if not names:
        raise StartError(f"{folder.resolve()} holds no model; expected <name>/<version>/{manifests.FILE_NAME}")
    selected = sorted(selection.models or names)
    for name in selected:
        if name not in names:
            raise StartError(f"VAE_VERSIONS names {name}, but the models are {', '.join(names)}")
    if not wanted and len(selected) == 1:
        return selected[0]
    path = folder / manifests.DEFAULT_FILE
    default = wanted or _named_in(path)
    if not default:
        raise StartError(
            f"no default model among {', '.join(selected)}; set VAE_DEFAULT_MODEL, or write one of them into {path}"
        )
    if default not in selected:
        source = "VAE_DEFAULT_MODEL is" if wanted else f"VAE_DEFAULT_MODEL is not set and {path} names"
        raise StartError(f"{source} {manifests.shown(default)}, but the models are {', '.join(selected)}")
    return default


def _named_in(path: Path) -> str:
    """The line in the file; empty without one.

    Raises: StartError where it cannot be read.
    """
    if not path.exists() or path.is_dir():  # a model of that name
        return ""
    advice = "write one model's name into it, or set VAE_DEFAULT_MODEL"
    try:
        text = manifests.read_file(path.parent, path.name, manifests.MAX_DEFAULT_BYTES, advice)
    except ManifestError as error:
        raise StartError(str(error)) from error
    return text.decode(errors="replace").strip()


def _is_seen(*paths: Path) -> bool:
    return not any(path.name.startswith(".") for path in paths)
