"""Measurement of restored photographs and micrographs. Figures of every image are kept, so that a run can resume."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.comparisons.methods import Method
from experiments.photographs.camera import as_levels
from experiments.photographs.cases import RESTORED, Case, Spoilt, gaussian, measurements
from experiments.photographs.figures import Figures, figures
from experiments.photographs.methods import OURS, Settings, ours, rivals
from experiments.photographs.results import Place, Results
from experiments.photographs.sets import Picture, load
from service.contract.images import Pixels
from training.errors import ConfigError, RefusedError
from training.evaluation.served import Client, ServiceOptions, offering, served
from training.evaluation.tasks import Seen
from training.extras import needed

PIXELS_512 = 512 * 512
FOLDER = Path("restore") / "photographs"
"""Folder of the kept figures, in that of the runs."""


@dataclass(frozen=True, kw_only=True)
class PhotographOptions(ServiceOptions):
    """Options of `restore --set`.

    Attributes:
        runs: Folder for kept figures.
        sets: Names of the sets.
        sigmas: Standard deviations of the noise in 255ths; empty for each measurement's own.
        asked: Names of the measurements.
        methods: Patterns of the methods' names.
        limit: Maximum number of images of each set; None takes all.
    """

    runs: Path
    sets: tuple[str, ...]
    sigmas: tuple[float, ...]
    asked: tuple[str, ...]
    methods: tuple[str, ...] = ("*",)
    limit: int | None = None

    @property
    def results(self) -> Results:
        """The kept figures."""
        return Results(self.runs / FOLDER)


class Cell(NamedTuple):
    """One image under one case, to be restored by one method; `shown` on a sheet or not."""

    picture: Picture
    case: Case
    method: Method
    place: Place
    shown: bool


def measure(plan: PhotographOptions) -> None:
    """Measure what is asked for and not yet known. What the service refuses is printed and left out.

    Args:
        plan: The options.

    Raises:
        ConfigError: No set, case and method match, or no model that is served denoises images of any size.
        DataError: A set is not in the folder of the data sets.
        DependencyError: A package of the extra `evaluation` is not installed.
        ServiceError: The service does not answer.
    """
    needed("skimage")
    with ExitStack() as stack:
        methods, model = rivals(), ""
        if any(pattern.startswith((OURS, "*")) for pattern in plan.methods):
            client = stack.enter_context(served(plan.url, plan.models))
            described = chosen_model(client, plan.names)
            model = described["model"]
            methods += ours(client, model, described["fingerprint"], plan.seed)
        cells = {(cell.place, cell.picture.name): cell for cell in _cells(plan, methods, model)}
        if not cells:
            raise ConfigError("nothing to measure: no set, measurement and method go together")
        _work_off(plan, list(cells.values()), {method.name: method for method in methods})


def chosen_model(client: Client, names: str) -> dict[str, Any]:
    """Choose the first model that denoises images of any size.

    Args:
        client: A client of the service.
        names: Pattern of the models' names.

    Returns:
        Its description.

    Raises:
        ConfigError: There is none.
    """
    able = [one for one in offering("denoise", names, client.models()) if "height" in one["input_shape"]]
    if not able:
        raise ConfigError(f"no model {names} that is served denoises images of any size; --model names one")
    return able[0]


def _cells(plan: PhotographOptions, methods: list[Method], model: str) -> Iterator[Cell]:
    known = measurements(plan.sigmas)
    for name in plan.sets:
        pictures = load(plan.data, name, plan.limit)
        for measurement in (known[one] for one in plan.asked if name in known[one].sets):
            for case in measurement.cases:
                for method in methods:
                    if method.does(case.task) and _wanted(method.name, measurement.methods, plan.methods):
                        place = Place(name, case.name, label(method.name, model))
                        yield from (Cell(one, case, method, place, one is pictures[0]) for one in pictures)


def label(method: str, model: str) -> str:
    """Name of a method in files and tables: the model's comes after `ours`."""
    return method.replace(OURS, f"{OURS} {model}", 1) if method.startswith(OURS) else method


def _wanted(name: str, *patterns: tuple[str, ...]) -> bool:
    return all(any(fnmatch(name, one) for one in some) for some in patterns)


def _work_off(plan: PhotographOptions, cells: list[Cell], methods: dict[str, Method]) -> None:
    settings = Settings(plan.data, plan.runs / FOLDER / "settings.json", plan.seed)
    results = plan.results
    known: dict[tuple[Place, str], dict[str, Figures]] = {}
    refused: set[Place] = set()
    bar = tqdm(cells, desc="restoring", unit="image")
    for cell in bar:
        method, task = cell.method, cell.case.task
        bar.set_postfix_str(" ".join(cell.place))
        setting = settings.of(method, task, len(cell.picture.x))
        key = f"{method.kept}, setting {setting:g}, seed {plan.seed}"
        if (cell.place, key) not in known:
            known[cell.place, key] = results.known(cell.place, key)
        if cell.picture.name in known[cell.place, key] or cell.place in refused:
            continue
        try:
            results.add(cell.place, cell.picture.name, key, _measured(cell, setting, methods, plan))
        except RefusedError as error:
            refused.add(cell.place)
            tqdm.write(f"{', '.join(cell.place)}: {error}")


def _measured(cell: Cell, setting: float, methods: dict[str, Method], plan: PhotographOptions) -> Figures:
    """Restore one image; draws the sheet of a shown one."""
    spoilt = cell.case.spoilt(cell.picture, plan.seed)
    if cell.case.name == RESTORED:
        spoilt = _restored(spoilt, methods[OURS])
    began = time.perf_counter()
    restored = cell.method.restore(cell.case.task, spoilt.seen, setting)
    seconds = (time.perf_counter() - began) * PIXELS_512 / spoilt.x[0, 0].size
    if cell.shown:
        blocks = {"truth": spoilt.x, "sent": spoilt.seen.y, cell.place.method: restored.images}
        plan.results.show(cell.place, blocks if restored.std is None else {**blocks, "5 std": 5.0 * restored.std})
    return {**figures(cell.case, spoilt, restored), "setting": setting, "seconds_512": round(seconds, 4)}


def _restored(spoilt: Spoilt, method: Method) -> Spoilt:
    """Make the restoration of a noisy image, in 8 bits, what is sent and what must come back."""
    image = method.restore(gaussian(25.0).task, spoilt.seen, 0.0).images
    levels: Pixels = (as_levels(image[0]) / 255.0).astype("float32")
    x = levels.reshape(1, 1, *levels.shape) if levels.ndim == 2 else levels.transpose(2, 0, 1)[None]
    return Spoilt(x, Seen(x, None))
