"""What a run shows while it trains: pictures, a log of short runs too, TensorBoard."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from training.__main__ import main
from training.canvas import CAPTION, CELL, GAP, png, sheet, small_png
from training.config import load
from training.loop import loop as loops
from training.loop import pictures, trainer
from training.loop.pictures import Pictures, draw_curves, vae_blocks
from training.loop.processes import ALONE
from training.loop.stages import build_vae, restoration_stage, trained_vae, vae_stage
from training.loop.trainer import Stage, train
from training.models.vae import VAE, Bound

CPU = torch.device("cpu")
CONFIG = Path(__file__).parents[2] / "training" / "configs" / "digits.toml"
RUN = load(CONFIG, {"train": {"epochs": 2}, "restoration": {"train": {"epochs": 1}}})
SHAPE = (1, 8, 8)
HEAD = CAPTION + 2 * GAP


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Digits of the training split."""
    return RUN.data.load(Path()).train[:300]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 28, 20), (3, 9, 5), (2, 8, 8)])
def test_small_images_are_enlarged_pixel_by_pixel(shape: tuple[int, int, int]) -> None:
    """The cell of each image holds its levels, each as a square of the same size; grey, RGB, and the first of two."""
    x = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.float32) / 255.0
    page = np.asarray(sheet({"some images": x}, columns=2))
    channels, height, width = shape
    factor = CELL // max(height, width)
    assert (page.ndim == 3) == (channels == 3)
    top, left = HEAD + height * factor + GAP, GAP  # the third image begins the second row
    cell = page[top : top + height * factor, left : left + width * factor]
    wanted = np.rint((x[2] if channels == 3 else x[2, :1]) * 255.0).astype(np.uint8)
    enlarged = wanted.repeat(factor, 1).repeat(factor, 2).transpose(1, 2, 0).squeeze()
    assert np.array_equal(cell, enlarged.reshape(cell.shape))


def test_large_images_are_shrunk_and_a_sheet_keeps_its_bytes() -> None:
    """Blocks of different sizes share a sheet; a limit of bytes makes the cells smaller."""
    noise = np.random.default_rng(0).random((4, 3, 300, 200), np.float32)
    blocks = {"large": noise, "small": noise[:, :1, :8, :8]}
    page = sheet(blocks, 4)
    assert page.mode == "RGB"
    assert page.height == 2 * (HEAD + CELL + GAP) + GAP
    assert len(png(page)) > 50_000
    assert len(small_png(blocks, 4, 50_000)) <= 50_000


def test_pictures_leave_the_weights_as_they_are(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewed at every step, both pictures exist, and the weights are those of a run without pictures, bit for bit."""
    for name in ("FIRST_S", "PICTURES_S", "PAUSE"):
        monkeypatch.setattr(pictures, name, 0.0)
    drawn: list[int] = []
    monkeypatch.setattr(pictures, "draw_curves", lambda *_: drawn.append(1))
    states = []
    for name, show in (("with", None), ("without", False)):
        stage = vae_stage(RUN, SHAPE, CPU)
        if show is False:
            stage = dataclasses.replace(stage, show=None)
        train(stage, images, tmp_path / name, held_out=images[:20])
        states.append(torch.load(tmp_path / name / "vae.pt", weights_only=True))
    assert len(drawn) == states[0]["step"] + 1  # after each step, and at the end
    for part in ("module", "averaged"):
        assert all(torch.equal(states[0][part][key], value) for key, value in states[1][part].items())
    assert not (tmp_path / "without" / "sheet.png").exists()


def test_the_sheets_of_both_stages(images: Tensor, tmp_path: Path) -> None:
    """The first shows images, reconstructions and two rows of samples; the second corrupted and restored ones too."""
    train(vae_stage(RUN, SHAPE, CPU), images, tmp_path, held_out=images[:20])
    cell = 8 * (CELL // 8) + GAP
    with Image.open(tmp_path / "sheet.png") as first:
        assert first.size == (8 * cell + GAP, 3 * HEAD + 4 * cell + GAP)
        level = np.asarray(first)[HEAD : HEAD + CELL : CELL // 8, GAP : GAP + CELL : CELL // 8]
    assert np.array_equal(level, images[0, 0].numpy())
    vae = trained_vae(RUN, SHAPE, tmp_path, CPU)
    train(restoration_stage(RUN, vae, SHAPE, CPU), images, tmp_path, held_out=images[:20])
    with Image.open(tmp_path / "sheet.png") as second:
        assert second.size == (8 * cell + GAP, 5 * HEAD + 6 * cell + GAP)
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.format == "PNG"


class Pair(VAE):
    """An encoder and a decoder from elsewhere, without likelihood and prior."""

    latent_shape = (8,)

    def __init__(self, vae: VAE) -> None:
        torch.nn.Module.__init__(self)
        self.encoder, self.decoder = vae.encoder, vae.decoder

    def x_mean(self, z: Tensor) -> Tensor:
        """The decoder's answer between 0 and 1."""
        return self.decode(z).sigmoid()


def test_a_model_without_a_prior_has_no_samples(images: Tensor) -> None:
    """Images and reconstructions are shown all the same."""
    vae, x = build_vae(RUN, SHAPE), images[:3].float() / 255.0
    assert list(vae_blocks(vae, x, 0)) == ["held-out images", "reconstructions", "samples"]
    assert list(vae_blocks(Pair(vae), x, 0)) == ["held-out images", "reconstructions"]


def test_an_interrupted_run_leaves_its_pictures(images: Tensor, tmp_path: Path) -> None:
    """Ctrl-C after the first step renews both before the run ends."""
    loop = trainer._Loop(vae_stage(RUN, SHAPE, CPU), images, tmp_path, ALONE, images[:20])
    with pytest.raises(KeyboardInterrupt):
        loop.run(lambda: True)
    assert loop.step == 1
    assert {"curves.png", "sheet.png", "vae.pt"} <= {path.name for path in tmp_path.iterdir()}


def test_slow_drawing_is_rare(images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawing that takes a second is repeated after a hundred, whatever the usual pause."""
    monkeypatch.setattr(pictures, "PICTURES_S", 0.0)
    (tmp_path / "log.jsonl").touch()

    def show(_: Any, x: Tensor) -> dict[str, Tensor]:
        time.sleep(0.2)
        return {"held-out images": x}

    drawing = Pictures(tmp_path, show, images)
    drawing.draw(torch.nn.Identity())
    assert drawing.next - time.monotonic() > 100 * 0.2 - 1.0
    assert not drawing.due()


def test_curves_of_any_log(tmp_path: Path) -> None:
    """Figures that are infinite or no number, stages of different figures, steps out of order, and an empty log."""
    log, path = tmp_path / "log.jsonl", tmp_path / "curves.png"
    for content in (
        [],
        [{"stage": "a", "step": 9, "elbo": -1.0}, {"stage": "a", "step": 3, "held_out_elbo": float("-inf")}],
        [{"stage": "a", "step": 1, "elbo": float("nan"), "kl": 2.0}, {"stage": "b", "step": 1, "log_joint": 5.0}],
    ):
        log.write_text("".join(f"{json.dumps(line)}\n" for line in content))
        draw_curves(log, path)
        with Image.open(path) as picture:
            assert picture.format == "PNG"


def test_a_single_value_is_seen(tmp_path: Path) -> None:
    """A trial of one line in the log: its value is a point in the curves' colour, not an empty pair of axes."""
    log, path = tmp_path / "log.jsonl", tmp_path / "curves.png"
    log.write_text(json.dumps({"stage": "a", "step": 2, "kl": 0.5}) + "\n")
    draw_curves(log, path)
    with Image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert any(max(colour) - min(colour) > 100 for _, colour in colours)


def numbered(stage: Stage, seconds: float) -> Stage:
    """The stage with steps that take a while, and whose logged bound is their number."""
    steps = iter(range(1, 10**6))

    def objective(module: Any, x: Tensor, generator: torch.Generator) -> Bound:
        time.sleep(seconds)
        bound, number = stage.objective(module, x, generator), float(next(steps))
        return Bound(bound.log_likelihood - bound.log_likelihood.detach() + number, 0.0 * bound.kl)

    return dataclasses.replace(stage, objective=objective)


def test_a_short_run_has_a_curve(images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve slow steps have several lines, each the mean of the steps since the one before, the last of the end."""
    monkeypatch.setattr(loops, "LOG_S", 0.1)
    loop = trainer._Loop(numbered(vae_stage(RUN, SHAPE, CPU), 0.04), images, tmp_path, ALONE, None)
    loop.run(lambda: False)
    found = lines(tmp_path)
    steps = [line["step"] for line in found]
    assert steps[-1] == 12
    assert len(steps) >= 3
    for line, before in zip(found, [0, *steps], strict=False):
        assert line["elbo"] == pytest.approx((before + 1 + line["step"]) / 2)
    assert loop.elbo == pytest.approx(6.5)  # of the latest hundred steps, whatever the lines


def test_tensorboard_has_the_figures_of_the_log(images: Tensor, tmp_path: Path) -> None:
    """Read back by TensorBoard, also of a run that lost its last checkpoint: every figure once, and the sheet."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415  # slow

    train(vae_stage(RUN, SHAPE, CPU), images, tmp_path, held_out=images[:20], tensorboard=True)
    (tmp_path / "vae.pt").unlink()
    train(vae_stage(RUN, SHAPE, CPU), images, tmp_path, held_out=images[:20], tensorboard=True)
    board = EventAccumulator(str(tmp_path / "tensorboard" / "vae"))
    board.Reload()
    for name in ("elbo", "held_out_elbo"):
        told = {line["step"]: line[name] for line in lines(tmp_path) if name in line}
        assert [event.step for event in board.Scalars(name)] == list(told)
        assert [event.value for event in board.Scalars(name)] == pytest.approx(list(told.values()), rel=1e-5)
    assert board.Images("sheet")[-1].step == 12


@pytest.mark.usefixtures("own_signals")
def test_without_tensorboard_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before anything is trained."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "models"), "--threads", "1"]
    assert main(["fit", str(CONFIG), *run, "--tensorboard"]) == 1
    assert "pip install '.[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "vae.pt").exists()
