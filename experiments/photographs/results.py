"""Figures that are kept between runs: a file of JSON lines for each set, case and method, a line for each image.

Beside it lies a sheet of one image. Research sets are not to be published, so the folder is not part of the repository.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.photographs.figures import Figures
from service.contract.images import Pixels
from training.canvas import png, sheet
from training.files import write_whole

SHOWN = 512
"""Longer side of an image on a sheet in pixels, at most."""


class Place(NamedTuple):
    """What a file is about.

    Attributes:
        set: Name of the set.
        case: Name of the case.
        method: Name of the method, with that of the model after `ours`.
    """

    set: str
    case: str
    method: str


class Results:
    """Figures by set, case, method and image.

    Every line has the key of what it depends on, such as versions and seed. Lines of other keys than a file's last are
    out of date.

    Args:
        folder: Where the files lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, place: Place, image: str, key: str, found: Figures) -> None:
        """Append a line, as a whole."""
        path = self._folder / place.set / place.case / f"{place.method}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"image": image, "key": key, **found}) + "\n")

    def show(self, place: Place, blocks: Mapping[str, Pixels]) -> None:
        """Draw a sheet of images (1, c, h, w) in [0, 1] by caption beside a file of figures, as PNG."""
        path = self._folder / place.set / place.case / f"{place.method}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, png(sheet(blocks, columns=1, cell=SHOWN)))

    def known(self, place: Place, key: str | None = None) -> dict[str, Figures]:
        """Figures by image.

        Args:
            place: What they are about.
            key: The key that they must have; None takes that of the last line.
        """
        path = self._folder / place.set / place.case / f"{place.method}.jsonl"
        lines = list(_lines(path)) if path.exists() else []
        wanted = lines[-1]["key"] if key is None and lines else key
        valid = (line for line in lines if line["key"] == wanted)
        return {line.pop("image"): {name: line[name] for name in line if name != "key"} for line in valid}

    def places(self) -> list[Place]:
        """What there are figures of, sorted."""
        paths = self._folder.glob("*/*/*.jsonl")
        return sorted(Place(path.parts[-3], path.parts[-2], path.stem) for path in paths)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, but for one that an interrupt has cut off."""
    for text in path.read_text().splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue
