"""Default models: which model answers a request that names none, for each operation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from service.contract import manifest as manifests
from service.errors import StartError
from service.operations.registry import OPERATIONS
from service.repository.selection import Selection
from service.repository.version import start_errors

SETTING = "VAE_DEFAULT_MODEL"
EXAMPLE = "mnist,denoise=photo"

log = logging.getLogger(__name__)


class Defaults(NamedTuple):
    """Default models, in text as `mnist` or `mnist,denoise=photo,inpaint=photo`.

    Attributes:
        model: Name of the model of every operation that `others` lacks.
        others: Names of other models by operation.
    """

    model: str
    others: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def parse(cls, text: str, source: str = SETTING) -> Defaults:
        """Read the text.

        Args:
            text: One model, and pairs `operation=model`, separated by commas.
            source: Where the text is from, for messages.

        Raises:
            StartError: It is not of that form, or an operation is unknown.
        """
        known, plain, others = [operation.name for operation in OPERATIONS], [], {}
        for entry in filter(None, (part.strip() for part in text.split(","))):
            operation, equals, model = (part.strip() for part in entry.partition("="))
            if not equals:
                plain.append(entry)
                continue
            if operation not in known:
                raise StartError(
                    f"{source} names the operation {manifests.shown(operation)}; the operations are {', '.join(known)}"
                )
            if not model or operation in others:
                raise StartError(f"{source} must name one model for {operation}, as in {EXAMPLE}")
            others[operation] = model
        if len(plain) != 1:
            named = f"names {len(plain)} models" if plain else "names no model"
            raise StartError(f"{source} {named} for the operations that it does not list; name one, as in {EXAMPLE}")
        return cls(plain[0], {operation: model for operation, model in others.items() if model != plain[0]})

    def __str__(self) -> str:
        """The text."""
        return ",".join([self.model, *(f"{operation}={model}" for operation, model in self.others.items())])

    @property
    def models(self) -> list[str]:
        """Every model that is named, the one of most operations first."""
        return list(dict.fromkeys((self.model, *self.others.values())))

    def of(self, operation: str) -> str:
        """Name of the model of an operation."""
        return self.others.get(operation, self.model)

    def among(self, models: list[str], source: str) -> Defaults:
        """The defaults where some models may be missing: `model` then takes the operations of the others.

        Args:
            models: The models that there are.
            source: Where the defaults are from, for the log.
        """
        missing = {operation: model for operation, model in self.others.items() if model not in models}
        for model in dict.fromkeys(missing.values()):
            operations = ", ".join(operation for operation, named in missing.items() if named == model)
            log.warning(
                "%s names %s for %s, but the models are %s; %s answers these requests",
                source, manifests.shown(model), operations, ", ".join(models), self.model,
            )  # fmt: skip
        return self._replace(others={name: model for name, model in self.others.items() if name not in missing})


def model_names(folder: Path) -> list[str]:
    """Return the models in a folder that have a version; hidden folders are left out."""
    return sorted({path.parent.name for path in folder.glob("*/*/") if is_visible(path.parent, path)})


def is_visible(*paths: Path) -> bool:
    """Whether no path has a hidden name."""
    return not any(path.name.startswith(".") for path in paths)


def default_models(folder: Path, selection: Selection, wanted: str) -> Defaults:
    """Return the default models: those that are wanted, else the only model, else those that the file `default` names.

    The file describes the whole folder. Where the model that it names for an operation is not there or not selected,
    the model of most operations takes its place, and the log says so.

    Args:
        folder: Folder of <model>/<version>/manifest.json.
        selection: The versions that are served.
        wanted: Text of default models; may be empty.

    Raises:
        StartError: There is no folder or no model, several models and no default, or a model that is named is missing.
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
        return Defaults(selected[0])
    path = folder / manifests.DEFAULT_FILE
    text, source = (wanted, SETTING) if wanted else (_line_in(path), f"{SETTING} is not set and {path}")
    if not text:
        raise StartError(
            f"no default model among {', '.join(selected)}; set {SETTING}, or write one of them into {path}"
        )
    found = Defaults.parse(text, source)
    for name in found.models if wanted else [found.model]:
        if name not in selected:
            raise StartError(f"{source} names {manifests.shown(name)}, but the models are {', '.join(selected)}")
    return found.among(selected, str(path))


def _line_in(path: Path) -> str:
    """Return the line in a file; empty where there is no file.

    Raises:
        StartError: It cannot be read.
    """
    if not path.exists() or path.is_dir():  # a model of that name
        return ""
    advice = f"write one model's name into it, or a list as in {EXAMPLE}, or set {SETTING}"
    with start_errors():
        text = manifests.read_file(path.parent, path.name, manifests.MAX_DEFAULT_BYTES, advice)
    return text.decode(errors="replace").strip()
