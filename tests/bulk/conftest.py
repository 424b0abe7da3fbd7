"""Real images in every form that a bulk run reads, and the operator in the test's own process."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from service.bulk.operator import Job, Operator, Outcome
from service.bulk.run import Report, Request, run
from service.bulk.source import Task
from service.settings import Settings

MODELS = Path(__file__).parents[2] / "models"
Levels = NDArray[np.uint8]


def here(job: Job, tasks: Sequence[Task], _count: int | None) -> Generator[Outcome]:
    """Work off tasks in this process."""
    with closing(Operator(job)) as operator:
        yield from map(operator, tasks)


def bulk(operation: str, source: Path | str, target: Path, **asked: Any) -> Report:
    """A run of the smallest model that comes with the project, in this process unless a pool is named."""
    further = {name: asked.pop(name) for name in ("workers", "pool") if name in asked}
    request = Request(operation, str(source), str(target), **{"model": "mnist-2d", **asked})
    return run(Settings(models=MODELS), request, progress=False, **{"pool": here, **further})


@pytest.fixture(scope="session")
def levels() -> Levels:
    """200 of scikit-learn's digits, enlarged to 28 x 28, as levels of 0 to 255."""
    digits = load_digits().images[:200] * (255.0 / 16.0)
    images = [Image.fromarray(np.rint(one).astype(np.uint8)).resize((28, 28)) for one in digits]
    return np.stack([np.asarray(one) for one in images])


def png(image: Levels) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path, levels: Levels) -> Path:
    """70 pictures in two folders."""
    home = tmp_path / "pictures"
    for k, image in enumerate(levels[:70]):
        path = home / f"{k // 40}" / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return home


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Any], Path]:
    """A function that writes a table, or several as a data set, and gives its path."""
    from pyarrow import parquet  # noqa: PLC0415  # slow to import

    def write(table: Any, name: str = "images.parquet", **options: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, path, **options)
        return path

    return write
