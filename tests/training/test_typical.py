"""Bounds of the figures that tell images far from the training images: set on one half, measured on the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.contract.manifest import Manifest
from service.contract.typical import far
from tests.support.versions import free_version, opened
from training.evaluation.served import Answer
from training.evaluation.tasks import INPAINTING, POISSON, noise
from training.evaluation.typical import (
    MOST_HELD_OUT,
    Condition,
    Typical,
    bounds_of,
    clean_figures,
    far_from_training,
    other_images,
)

TASKS = [*noise("0.1"), POISSON[0], *INPAINTING]
COUNT = 1000


def strokes(seed: int, count: int = COUNT) -> np.ndarray:
    """White strokes on black of several widths: images with bounds below and above."""
    rng = np.random.default_rng(seed)
    x = np.zeros((count, 1, 16, 16), np.float32)
    for image in x[:, 0]:
        width, place = rng.integers(2, 5), rng.integers(3, 9)
        image[2:14, place : place + width] = rng.uniform(0.8, 1.0)
    return x


class Perfect:
    """A service that takes all noise away, as far as it knows the clean images; it counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def images(self, _model: str, _operation: str, y: np.ndarray, _mask: None, **_options: object) -> Answer:
        """A rough guess: smoothed, and black or white again."""
        self.asked += 1
        return Answer({"images": np.clip(2.0 * y - 0.5, 0.0, 1.0)}, np.full(len(y), 0.1))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of any model that restores."""
    return opened(free_version(tmp_path_factory.mktemp("m") / "m" / "1", channels=(1,))).manifest


def test_other_kinds_are_told_and_held_out_ones_are_not(manifest: Manifest, tmp_path: Path) -> None:
    """At most one in a hundred of images of the same kind, all of others; asked once, also after an interruption."""
    service = Perfect()
    typical = Typical(service.images, manifest, 0, tmp_path)
    grey = np.random.default_rng(1).uniform(0.3, 0.7, (50, 1, 16, 16)).astype(np.float32)
    found = far_from_training(typical.figures, strokes(0), TASKS, {"grey": grey}, 0)
    assert found.sound
    assert found.held_out <= MOST_HELD_OUT
    assert found.caught.keys() == {"inverted", "2x - 1", "black", "white", "grey"}
    assert (found.images, set(found.bounds)) == (COUNT, {"brightness", "greyness", "roughness"})
    other = [far(typical.figures(strokes(9), condition), found.bounds).mean() for condition in (Condition(None),)]
    assert max(other) <= 2 * MOST_HELD_OUT
    asked = service.asked
    assert far_from_training(typical.figures, strokes(0), TASKS, {"grey": grey}, 0) == found
    assert service.asked == asked


def test_what_cannot_be_told_is_not_called_sound(manifest: Manifest, tmp_path: Path) -> None:
    """Images of another kind with the same figures; and where no other kind was there to be measured."""
    typical = Typical(Perfect().images, manifest, 0, tmp_path)
    alike = far_from_training(typical.figures, strokes(0), [], {"mirrored": strokes(5, 50)[..., ::-1].copy()}, 0)
    assert not alike.sound
    assert alike.caught["mirrored"] < 0.5
    assert not far_from_training(clean_figures, strokes(0), [], {}, 0).sound


def test_bounds_are_as_tight_as_they_may_be() -> None:
    """With one condition, up to a third of a per cent is outside three figures; a wider condition widens them."""
    rng = np.random.default_rng(0)
    one = {name: rng.standard_normal(4000).astype(np.float32) for name in ("brightness", "greyness", "roughness")}
    tight = bounds_of([one])
    assert 0.0 < float(far(one, tight).mean()) <= MOST_HELD_OUT / 3
    wide = bounds_of([one, {name: 3 * values for name, values in one.items()}])
    assert all(wide[name][0] < tight[name][0] and wide[name][1] > tight[name][1] for name in tight)


def test_other_images_are_of_the_models_shape_and_of_no_kind_of_its_own(tmp_path: Path) -> None:
    """Photographs in parts; a model of faces is not shown faces, and data that are not there are left out."""
    folder = tmp_path / "photos" / "dev"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(rng.integers(0, 255, (80, 96, 3), np.uint8)).save(folder / f"{k}.png")
    found = other_images(tmp_path, {"dataset": "mnist", "input_shape": [1, 20, 12]})
    assert {kind: images.shape for kind, images in found.items()} == {"photographs": (192, 1, 20, 12)}
    assert other_images(tmp_path / "photos", {"dataset": "mnist", "input_shape": [1, 20, 12]}) == {}
