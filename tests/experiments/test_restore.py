"""`python -m experiments restore`: what is seen, what is measured, and the whole command with a service of its own."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.comparisons.methods import Restored
from experiments.comparisons.restore import figures
from training.data import Folder
from training.errors import ConfigError, RefusedError, ServiceError
from training.evaluation.served import ROOT, served, started
from training.evaluation.tasks import SUBJECTS, Task, subject_of

pytestmark = pytest.mark.usefixtures("own_signals")


@pytest.fixture
def x() -> np.ndarray:
    """Images of 28 x 28, black and grey."""
    return np.random.default_rng(0).integers(0, 2, (60, 1, 28, 28)).astype(np.float32) * np.float32(0.5)


def test_what_is_seen_is_what_the_task_says(x: np.ndarray) -> None:
    """Noise of the level, uncut; shares of pixels; means of blocks; always the same, and another for another seed."""
    tasks = {task.name: task for task in SUBJECTS["mnist"].tasks}
    seen = {name: task.seen(x, 3) for name, task in tasks.items()}
    assert (seen["Gaussian 0.25"].y - x).std() == pytest.approx(0.25, abs=0.005)
    assert seen["Gaussian 0.25"].y.min() < -0.5
    assert (seen["salt and pepper 0.3"].y == 1.0).mean() == pytest.approx(0.15, abs=0.01)
    assert (seen["masking 0.5"].y == 0.0).mean() == pytest.approx(0.75, abs=0.01)
    mask = seen["scattered pixels missing"].mask
    assert mask is not None
    assert mask.mean() == pytest.approx(0.5, abs=0.01)
    half = seen["bottom half missing"]
    assert half.mask is not None
    assert half.mask[:, :, :14].all()
    assert not half.mask[:, :, 14:].any()
    assert not half.y[:, :, 14:].any()
    np.testing.assert_allclose(seen["super-resolution x4"].y, x.reshape(60, 1, 7, 4, 7, 4).mean((3, 5)), atol=1e-6)
    again, other = tasks["Gaussian 0.1"].seen(x, 3).y, tasks["Gaussian 0.1"].seen(x, 4).y
    assert (again == seen["Gaussian 0.1"].y).all()
    assert (again != other).any()


@pytest.mark.parametrize("name", ["scattered pixels missing", "super-resolution x2", "Gaussian 0.1"])
def test_the_linear_operator_is_what_was_done(name: str, x: np.ndarray) -> None:
    """operator @ x is what is seen, but for the noise."""
    task = next(task for task in SUBJECTS["mnist"].tasks if task.name == name)
    seen = Task(name, "denoise", "gaussian", 1e-9).seen(x, 0) if task.level else task.seen(x, 0)
    y, operator = task.linear(seen, 5, (1, 28, 28))
    np.testing.assert_allclose(operator @ x[5].reshape(-1), y, atol=1e-6)


def test_the_figures_of_answers_that_are_known(x: np.ndarray) -> None:
    """Twice the noise on every second image makes half of them worse; a level 10 % too high is an error of 0.1."""
    pytest.importorskip("skimage", reason="needs the extra evaluation")
    task = Task("Gaussian 0.1", "denoise", "gaussian", 0.1)
    seen = task.seen(0.5 + 0 * x, 0)
    scale = np.where(np.arange(60) % 2, 2.0, 0.5)[:, None, None, None]
    restored = Restored((0.5 + scale * (seen.y - 0.5)).astype(np.float32), np.full_like(x, 0.1), np.full(60, 0.11))
    found = figures(task, seen, restored, 0.5 + 0 * x)
    assert found["worse"] == 0.5
    assert found["psnr_db"] == pytest.approx(20.0, abs=0.1)
    assert found["level_error"] == pytest.approx(0.1, abs=1e-4)
    assert found["coverage"] == pytest.approx((0.999 + 0.589) / 2.0, abs=0.01)


def test_the_table_of_a_service_of_its_own(
    digits_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command starts a service, asks it, writes page, CSV and pictures; rivals' answers are kept for the next."""
    pytest.importorskip("skimage", reason="needs the extra evaluation")
    command = ["restore", "--models", str(digits_models), "--runs", str(tmp_path), "--out", str(tmp_path / "out")]
    command += ["--images", "20", "--unet-epochs", "1", "--tasks", "Gaussian*", "bottom*", "super*"]
    command += ["--methods", "ours fast*", "ours refined", "enc*", "as*", "Gau*", "U-Net", "Wiener", "bicubic"]
    assert main(command) == 0, capsys.readouterr().err
    with (tmp_path / "out" / "restoration.csv").open() as file:
        rows = {(row["task"], row["method"]): row for row in csv.DictReader(file)}
    assert {row["dataset"] for row in rows.values()} == {"digits"}
    assert len(rows) == 8 + 3 + 4
    noisy, ours = rows["Gaussian 0.25", "as it was seen"], rows["Gaussian 0.25", "ours fast"]
    assert float(ours["psnr_db"]) > float(noisy["psnr_db"]) + 0.5
    assert 0.5 < float(ours["coverage"]) <= 1.0
    assert float(ours["ms_batch_16"]) < float(ours["ms_batch_1"])
    assert float(rows["Gaussian 0.25", "ours fast auto"]["level_error"]) < 0.5
    assert rows["Gaussian 0.25", "Wiener"]["setting"] in {"3.0", "5.0", "7.0"}
    page = (tmp_path / "out" / "restoration.md").read_text()
    assert "| ours refined |" in page
    assert "mnist: no model of it" in page
    for picture in ("restoration.png", "restoration-pictures.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "restore").glob("*.npz")}
    assert len(kept) == 5
    assert main(command) == 0
    assert {path.name for path in (tmp_path / "restore").glob("*.npz")} == {path.name for path in kept}


def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    """In its own words; and one that is not there is told by its address."""
    with pytest.raises(ServiceError, match="no model"), served(None, tmp_path):
        pass


def test_the_service_ends_with_the_block(digits_models: Path) -> None:
    """Also where it is left by an interrupt; what it refuses is told in its own words, with its code."""

    def interrupted() -> Iterator[subprocess.Popen[str]]:
        with started(VAE_MODELS=str(digits_models)) as (process, url):
            yield process
            with served(url, digits_models) as client, pytest.raises(RefusedError, match="kernels") as refusal:
                client.images("digits", "reconstruct", np.zeros((1, 1, 8, 8), np.float32), kernels=3)
            assert refusal.value.code == "invalid_option"
            raise KeyboardInterrupt

    running = interrupted()
    process = next(running)
    assert process.poll() is None
    with pytest.raises(KeyboardInterrupt):
        next(running)
    assert process.returncode is not None


def told(**changes: Any) -> dict[str, Any]:
    """What a service says of a model that somebody trained on a folder of theirs."""
    data = {"dataset": "folder", "height": 16, "width": 18, "mode": "RGB", "test": 0.25, "seed": 3}
    training = {"settings": {"data": data}, "train_images": 1000}
    about = {"model": "cells", "dataset": "folder", "input_shape": [3, 16, 18], "training": training}
    return {**about, **changes}


def test_images_of_any_model_are_those_that_its_training_held_out() -> None:
    """Its own settings say how the folder is split; tasks that its size does not allow are left out."""
    name, subject = subject_of(told())
    assert name == "cells"
    assert subject.dataset == Folder(dataset="folder", height=16, width=18, mode="RGB", test=0.25, seed=3)
    assert {task.factor for task in subject.tasks if task.operation == "super-resolve"} == {2}
    assert subject.timed in {task.name for task in subject.tasks}
    assert subject_of(told(input_shape=[3, "height", "width"]))[1] == subject  # images of any size, at that of crops
    assert subject_of(told(dataset="mnist_static", model="static"))[0] == "mnist"


def test_a_model_that_does_not_tell_its_data_is_named() -> None:
    """One that another program exported."""
    with pytest.raises(ConfigError, match=r"cells does not name its data set"):
        subject_of(told(training={}))


def test_several_models_need_no_default(digits_models: Path, tmp_path: Path) -> None:
    """The service that a command starts serves whatever lies there, since its models are asked by their names."""
    for name, models in (("digits", digits_models), ("mnist-2d", ROOT / "models")):
        (tmp_path / name).symlink_to(models / name)
    with served(None, tmp_path) as client:
        assert {one["model"] for one in client.models()} == {"digits", "mnist-2d"}
