"""Random crops of a folder of pictures: seeded, bounded, and of pictures that no two splits share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from training.data import Folder, ImageSet
from training.data.crops import Crops, CropSettings, Picture, roughness
from training.errors import DataError

SEED = 3


def settings(**changed: Any) -> Folder:
    """The table `[data]` of a run on crops of 8 x 8, 60 an epoch."""
    crops = {"per_epoch": 60, **changed.pop("crops", {})}
    table = {"dataset": "folder", "height": 8, "width": 8, "mode": "L", "seed": SEED, "validation": 0.2, "test": 0.2}
    return Folder.model_validate({**table, "crops": crops, **changed})


def noise(root: Path, count: int, first: int = 0, size: tuple[int, int] = (24, 20)) -> None:
    """Grey pictures of noise: levels of number i lie between 8 i and 8 i + 7, so that a pixel names its picture."""
    root.mkdir(exist_ok=True)
    for i in range(first, first + count):
        levels = np.random.default_rng(i).integers(8 * i, 8 * i + 8, size, np.uint8)
        Image.fromarray(levels).save(root / f"{i:02}.png")


def sources(images: torch.Tensor) -> set[int]:
    """Numbers of the pictures that crops come from."""
    return set((images // 8).unique().tolist())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of 24 x 20."""
    root = tmp_path_factory.mktemp("pictures")
    noise(root, 10)
    return root


@pytest.fixture(scope="module")
def images(pictures: Path) -> ImageSet:
    """Crops of them."""
    return settings().load(pictures)


def epochs(crops: Crops, numbers: list[int], workers: int) -> list[torch.Tensor]:
    """The crops of some epochs, by a new set of workers."""
    again = Crops(crops.visits, workers, skip=False)
    found = torch.empty(60, 1, 8, 8, dtype=torch.uint8)
    copies = []
    for number in numbers:
        again.fill(found, number, ahead=True)
        copies.append(found.clone())
    again.close()
    return copies


def test_crops_are_a_function_of_seed_and_epoch(images: ImageSet) -> None:
    """No worker, one and two give the same crops; a run that begins at epoch 2 gets those of epoch 2."""
    assert images.crops is not None
    here = epochs(images.crops, [0, 1, 2], 0)
    assert torch.equal(here[0], images.train)
    assert len(torch.cat(here).unique(dim=0)) > 150  # of 180
    for workers in (1, 2):
        assert all(map(torch.equal, epochs(images.crops, [0, 1, 2], workers), here))
        assert torch.equal(epochs(images.crops, [2], workers)[0], here[2])


def test_another_seed_cuts_others(pictures: Path, images: ImageSet) -> None:
    """The seed of the data also chooses the crops; the same seed repeats them, those held out too."""
    assert not torch.equal(settings(seed=SEED + 1).load(pictures).train, images.train)
    again = settings().load(pictures)
    assert all(
        map(torch.equal, (again.train, again.validation, again.test), (images.train, images.validation, images.test))
    )


def test_splits_share_no_picture(images: ImageSet) -> None:
    """Ten pictures: two for the test, two for validation, six to train, all of which an epoch has."""
    parts = [sources(part) for part in (images.train, images.validation, images.test)]
    assert [len(part) for part in parts] == [6, 2, 2]
    assert set.union(*parts) == set(range(10))
    assert [len(part) for part in (images.train, images.validation, images.test)] == [60, 12, 12]


def test_a_large_folder_takes_turns(tmp_path: Path) -> None:
    """An epoch opens only as many pictures as give its crops; every picture comes once before any comes again."""
    noise(tmp_path, 20)
    found = settings(crops={"per_epoch": 16}, validation=0.05, test=0.05).load(tmp_path)
    assert found.crops is not None
    seen = []
    for epoch in range(9):
        found.crops.fill(found.train, epoch)
        assert len(sources(found.train)) == 2
        seen += sources(found.train)
    assert len(set(seen)) == 18


def test_crop_is_a_part_of_the_picture(pictures: Path) -> None:
    """At scale 1 without flips every crop is found in its picture as it is."""
    found = settings(crops={"scales": [1.0], "flips": False}).load(pictures)
    for crop in found.train[:, 0].numpy():
        whole = np.asarray(Image.open(pictures / f"{crop[0, 0] // 8:02}.png"))
        parts = np.lib.stride_tricks.sliding_window_view(whole, (8, 8))
        assert (parts == crop).all((2, 3)).any()


def test_a_smaller_scale_is_the_mean_of_areas() -> None:
    """At scale 1/2 a pixel is the mean of four, so an 8 x 8 crop of a 16 x 16 picture is all of it."""
    levels = np.random.default_rng(1).integers(0, 256, (1, 16, 16), np.uint8)
    picture = Picture((16, 16), lambda box: levels[:, box[1] : box[3], box[0] : box[2]])
    crop = CropSettings(scales=(0.5,), flips=False).cut(picture, (8, 8), np.random.default_rng(0))
    means = levels.reshape(1, 8, 2, 8, 2).mean((2, 4))
    assert np.abs(crop - means).max() <= 1.0  # Pillow rounds each axis


@pytest.mark.parametrize(
    ("flips", "rotations", "count"), [(False, False, 1), (True, False, 2), (False, True, 4), (True, True, 8)]
)
def test_orientations(flips: bool, rotations: bool, count: int) -> None:
    """A picture of the crop's size comes in 1, 2, 4 or 8 orientations, mirrored left to right alone or turned too."""
    levels = np.arange(9, dtype=np.uint8).reshape(1, 3, 3)
    cut = CropSettings(scales=(1.0,), flips=flips, rotations=rotations).cut
    rng = np.random.default_rng(0)
    found = {cut(Picture((3, 3), lambda _: levels), (3, 3), rng).tobytes() for _ in range(100)}
    assert len(found) == count
    assert (levels[..., ::-1].tobytes() in found) == flips


def test_the_rougher_candidate_is_taken() -> None:
    """Of a picture that is half flat and half noise, more candidates give rougher crops."""
    levels = np.zeros((1, 64, 64), np.uint8)
    levels[..., 32:] = np.random.default_rng(1).integers(0, 256, (64, 32), np.uint8)
    picture = Picture((64, 64), lambda box: levels[:, box[1] : box[3], box[0] : box[2]])

    def mean(candidates: int) -> float:
        cut = CropSettings(candidates=candidates, scales=(1.0,)).cut
        rng = np.random.default_rng(0)
        return float(np.mean([roughness(cut(picture, (8, 8), rng)) for _ in range(200)]))

    assert mean(2) > 1.2 * mean(1)
    assert mean(8) > 1.2 * mean(2)


def test_scales_that_do_not_fit_are_left_out() -> None:
    """A picture of 10 x 30 holds crops of 8 x 8 at scales from 0.8."""
    found = CropSettings(scales=(1.0, 0.8, 0.79, 0.4)).usable((8, 8), (10, 30))
    assert found == [1.0, 0.8]


def test_orientation_and_colours_are_those_of_whole_images(tmp_path: Path) -> None:
    """A crop as large as the picture is the picture: upright by EXIF, transparency on black, 16 bit by its white."""
    rng = np.random.default_rng(2)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(rng.integers(0, 256, (8, 8, 4), np.uint8)).save(tmp_path / "b.png")
    Image.fromarray(rng.integers(0, 65536, (8, 8), np.uint16)).save(tmp_path / "c.png")
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "d.tiff")
    crops = {"scales": [1.0], "flips": False}
    found = settings(mode="RGB", crops=crops).load(tmp_path)
    whole = Folder(dataset="folder", height=8, width=8, validation=0.2, test=0.2, seed=SEED).load(tmp_path)
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(found, name).unique(dim=0), getattr(whole, name).unique(dim=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_stops_the_run_or_is_left_out(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pixels are read when they are due; the message names it, once, and another picture takes its place."""
    noise(tmp_path, 10)
    whole = settings(on_error="skip").load(tmp_path)
    assert whole.crops is not None
    broken = tmp_path / f"{min(sources(whole.train)):02}.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    stopping, skipping = (Crops(whole.crops.visits, workers, skip=skip) for skip in (False, True))
    with pytest.raises(DataError, match=rf'{broken.name} \(.*\) cannot be read; .*on_error = "skip"'):
        stopping.fill(whole.train, 0)
    capsys.readouterr()
    for epoch in range(2):
        skipping.fill(whole.train, epoch)
        assert len(sources(whole.train)) == 5
    assert capsys.readouterr().err.count("left out") == 1


def test_pictures_that_are_all_broken_end(tmp_path: Path) -> None:
    """Leaving out has an end: a folder whose files were all damaged is an error."""
    noise(tmp_path, 10)
    found = settings(on_error="skip").load(tmp_path)
    assert found.crops is not None
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="6 pictures in a row cannot be read"):
        found.crops.fill(found.train, 1)


def test_pictures_smaller_than_a_crop_are_named(tmp_path: Path) -> None:
    """They stop the run, or are left out."""
    noise(tmp_path, 10)
    noise(tmp_path, 1, 20, (7, 30))
    with pytest.raises(DataError, match=r"20\.png \(its 7 x 30 pixels hold no crop of 8 x 8\)"):
        settings().load(tmp_path)
    assert 20 not in sources(settings(on_error="skip").load(tmp_path).train)


def test_equal_files_are_kept_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy under another name is in no second split."""
    noise(tmp_path, 5)
    (tmp_path / "copy.png").write_bytes((tmp_path / "00.png").read_bytes())
    settings().load(tmp_path)
    assert "found 5 images (1 duplicate left out)" in capsys.readouterr().err


def test_frames_of_a_file_are_pictures(tmp_path: Path) -> None:
    """With frames = "all" crops come of every page."""
    noise(tmp_path, 9)
    first, *others = [Image.open(tmp_path / f"{i:02}.png") for i in range(9)]
    first.save(tmp_path / "film.tiff", save_all=True, append_images=others)
    for i in range(9):
        (tmp_path / f"{i:02}.png").unlink()
    noise(tmp_path, 2, 20)
    found = settings(frames="all", test=0.4, validation=0.4, crops={"per_epoch": 90}).load(tmp_path)
    parts = [sources(part) for part in (found.train, found.validation, found.test)]
    assert sorted(map(len, parts)) == [1, 1, 9]


def test_contradictory_settings_are_refused() -> None:
    """Whole images and crops at once, and turned crops that are not square."""
    with pytest.raises(ValidationError, match="whole images"):
        settings(fit="pad")
    with pytest.raises(ValidationError, match="height = width"):
        settings(width=16, crops={"rotations": True})


def test_workers_end_with_their_owner(images: ImageSet) -> None:
    """After `close` no worker is left."""
    assert images.crops is not None
    again = Crops(images.crops.visits, 2, skip=False)
    again.fill(torch.empty(60, 1, 8, 8, dtype=torch.uint8), 0, ahead=True)
    workers = again._ahead[1]._workers  # type: ignore[index,attr-defined]
    assert all(worker.is_alive() for worker in workers)
    again.close()
    for worker in workers:
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers)


MEMORY = """
import re, sys, torch
from pathlib import Path
from training.data import Folder

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

table = {"dataset": "folder", "height": 8, "width": 8, "crops": {"per_epoch": 16}}
images = Folder.model_validate(table).load(Path(sys.argv[1]))
images.crops.workers, before = 0, peak()
for epoch in range(1, 4):
    images.crops.fill(images.train, epoch)
print(peak() - before)
"""


def test_memory_holds_a_picture_not_the_folder(tmp_path: Path) -> None:
    """Of eight pictures of 16 MB a process that cuts crops holds few at a time, although it opens all of them."""
    plane = np.zeros((2048, 2048, 3), np.uint8)
    for i in range(8):
        plane[0, 0, 0] = i
        Image.fromarray(plane).save(tmp_path / f"{i}.png", compress_level=1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert 10_000 < int(done.stdout) < 60_000  # kB
