"""`python -m experiments restore --set`: what is sent, what is measured, what is kept, and the pages."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
from PIL import Image

from experiments.__main__ import main
from experiments.comparisons.methods import Method, Restored
from experiments.photographs import camera, sets, speed
from experiments.photographs.cases import CAMERA, JPEG, MISSING, gaussian, shrunk
from experiments.photographs.figures import affine_psnr, blocks, detail, intervals
from experiments.photographs.masks import MASKS
from experiments.photographs.methods import Settings, jointly, rivals
from experiments.photographs.results import Place, Results
from experiments.photographs.tables import table
from tests.support.versions import free_version
from training.errors import DataError
from training.evaluation.measures import psnr
from training.evaluation.served import ROOT, started

SIZE = (40, 48)
pytestmark = pytest.mark.usefixtures("own_signals")


def smooth(channels: int, seed: int) -> np.ndarray:
    """A picture (c, h, w) of two slow waves, in 8 bits."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] / 8.0
    phases = np.random.default_rng(seed).uniform(0.0, 6.0, (channels, 2, 1, 1))
    x = 0.5 + 0.2 * np.sin(rows + phases[:, 0]) + 0.2 * np.cos(columns + phases[:, 1])
    return (np.rint(x * 255.0) / 255.0).astype(np.float32)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder of small pictures: two sets of two photographs, micrographs of one field, and the choosers."""
    folder = tmp_path / "data"
    places = {f"photos/test/{name}/{k}.png": channels for name, channels in (("BSD68", 1), ("CBSD68", 3)) for k in "ab"}
    places |= {f"micrographs/w2s/test/{kind}/081_{k}.png": 1 for kind in ("noisy", "target") for k in (0, 2)}
    for seed, (place, channels) in enumerate({**places, "photos/dev/cid22/c.png": 3}.items()):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(camera.as_levels(smooth(channels, seed))).save(folder / place)
    lines = ["image,noisy,noise2noise_fmd,vst_bm3d", "081_0,20.0,30.0,31.0", "081_2,22.0,32.0,34.0"]
    (folder / "micrographs/w2s/baselines.csv").write_text("\n".join(lines))
    return folder


def picture(channels: int = 3) -> sets.Picture:
    return sets.Picture("BSD68", "a", smooth(channels, 1))


def test_light_is_that_of_the_srgb_standard() -> None:
    """A grey of 0.5 is 21.4 % of the light of white; both ways are inverse."""
    assert camera.linear(np.float32(0.5)) == pytest.approx(0.21404, abs=1e-5)
    x = np.linspace(0.0, 1.0, 256, dtype=np.float32)
    np.testing.assert_allclose(camera.finished(camera.linear(x)), x, atol=1e-6)


def test_the_sensor_s_noise_is_that_of_its_electrons() -> None:
    """At ISO 1600 a pixel holds 1,250 electrons: shot noise has the variance of their number, read-out adds 9."""
    raw = camera.exposed(np.full((400, 400), 0.2), 1600, np.random.default_rng(0))
    assert raw.mean() == pytest.approx(0.2, abs=1e-4)
    assert raw.var() == pytest.approx((0.2 * 1250 + 9) / 1250**2, rel=0.02)


def test_demosaicing_is_exact_on_planes() -> None:
    """A picture that rises linearly, alike in all colours, is interpolated without error; kernels have sum 1."""
    rows, columns = np.mgrid[:12, :14]
    ramp = np.stack([0.01 * rows + 0.02 * columns] * 3)
    found = camera.demosaiced(camera.mosaic(ramp))
    np.testing.assert_allclose(found[:, 2:-2, 2:-2], ramp[:, 2:-2, 2:-2], atol=1e-12)
    for kernel in (camera.CROSS, camera.ALONG, camera.ACROSS):
        assert kernel.sum() == pytest.approx(1.0)


def test_a_bright_scene_comes_back() -> None:
    """At a sensitivity near 0 all that is left is demosaicing and JPEG; more sensitivity, more noise."""
    x = picture().x
    errors = [psnr(camera.photographed(x, iso, np.random.default_rng(3))[None], x[None]).item() for iso in (1, 1600)]
    assert errors[0] > 30.0
    assert errors[1] < errors[0] - 1.0


@pytest.mark.parametrize("case", [*CAMERA[:1], *JPEG[:1]], ids=lambda case: case.name)
def test_pictures_are_sent_in_8_bits(case: object) -> None:
    """What a camera or a JPEG leaves are whole 255ths."""
    y = case.spoilt(picture(), 0).seen.y  # type: ignore[attr-defined]
    np.testing.assert_allclose(y * 255.0, np.rint(y * 255.0), atol=1e-3)


def test_noise_is_uncut_and_of_each_image() -> None:
    """Deviation as asked, values outside [0, 1], equal for equal names and seeds alone."""
    case, black = gaussian(50.0), sets.Picture("BSD68", "a", np.zeros((1, 200, 200), np.float32))
    y = case.spoilt(black, 0).seen.y
    assert y.std() == pytest.approx(50.0 / 255.0, rel=0.02)
    assert y.min() < -0.5
    assert (y == case.spoilt(black, 0).seen.y).all()
    for other, seed in ((black._replace(name="b"), 0), (black._replace(set="Set12"), 0), (black, 1)):
        assert abs(np.corrcoef(y.ravel(), case.spoilt(other, seed).seen.y.ravel())[0, 1]) < 0.03


def test_masks_hide_what_their_names_say() -> None:
    """Half of the pixels, a block, thin letters and scratches; what is seen is exact, equal in all channels."""
    shares = {name: mask(256, 320, np.random.default_rng(0)).mean() for name, mask in MASKS.items()}
    assert shares["50 % of pixels"] == pytest.approx(0.5, abs=0.01)
    assert shares["block"] == 24 * 24 / (256 * 320)
    assert 0.05 < shares["text"] < 0.25
    assert 0.005 < shares["scratches"] < 0.1
    for case in MISSING:
        x, (y, mask) = case.spoilt(picture(), 0)
        assert mask is not None
        assert (y == x * mask).all()
        assert (mask == mask[:, :1]).all()
        assert 0.0 < mask.mean() < 1.0


def test_block_means_are_of_the_cut_picture() -> None:
    """48 x 40 at factor 4 is 12 x 10; a remainder is cut off; enlarging by repetition gives the means back."""
    odd = sets.Picture("BSD68", "a", picture(1).x[:, :39, :46])
    x, (y, _) = shrunk(4).spoilt(odd, 0)
    assert (x.shape, y.shape) == ((1, 1, 36, 44), (1, 1, 9, 11))
    assert y[0, 0, 1, 2] == pytest.approx(x[0, 0, 4:8, 8:12].mean(), abs=1e-6)


def test_affine_psnr_forgives_gain_and_offset_alone() -> None:
    """Any gain and offset reach the bound; noise of 0.1 beside a signal of variance s leaves 0.01 s / (s + 0.01)."""
    rng = np.random.default_rng(0)
    x = rng.random((1, 1, 300, 300))
    assert affine_psnr(0.3 * x + 0.2, x) == 60.0
    left = 0.01 * (1 / 12) / (1 / 12 + 0.01)
    assert affine_psnr(x + 0.1 * rng.standard_normal(x.shape), x) == pytest.approx(-10 * np.log10(left), abs=0.05)


def test_block_variance_of_known_draws() -> None:
    """Errors and draws of one offset a block: the draws' variance is the error's; noise of pixels counts a 64th."""
    rng, zero = np.random.default_rng(0), np.zeros((1, 1, 320, 320))
    offsets = np.kron(rng.standard_normal((9, 1, 1, 40, 40)), np.ones((8, 8)))
    pixels = 0.8 * rng.standard_normal(zero.shape)
    found = blocks(zero, np.full_like(zero, np.sqrt(1.64)), offsets[1:], offsets[0] + pixels)
    assert found["block_error"] == pytest.approx(1.0 + 0.64 / 64, abs=0.1)
    assert found["block_drawn"] == pytest.approx(1.0, abs=0.05)
    within = np.maximum(1.64 - offsets[1:].var(0, ddof=1), 0.0).mean() / 64
    assert found["block_within"] == pytest.approx(within)


def test_intervals_of_a_right_posterior_hold_nine_in_ten() -> None:
    """And those of a deviation half as large 0.589; pixels of a deviation below 0.01 are counted apart."""
    x, zero = np.random.default_rng(0).standard_normal((1, 1, 400, 400)), np.zeros((1, 1, 400, 400))
    right, small = intervals(zero, zero + 1.0, x, None), intervals(zero, zero + 0.005, 0.005 * x, None)
    assert right["covered"] / right["counted"] == pytest.approx(0.9, abs=0.003)
    assert right["uncertain_counted"] == 160_000
    assert small["covered"] == right["covered"]
    assert small["uncertain_counted"] == 0
    half = intervals(zero, zero + 0.5, x, None)
    assert half["covered"] / half["counted"] == pytest.approx(0.589, abs=0.005)


def test_smoothing_lowers_the_detail() -> None:
    """The Laplacian of white noise has 20 times its variance; a plane has none."""
    noise = np.random.default_rng(0).standard_normal((1, 1, 300, 300))
    assert detail(noise) == pytest.approx(np.sqrt(20.0), rel=0.02)
    assert detail(np.mgrid[:9, :9][None, :1] * 0.1) == pytest.approx(0.0, abs=1e-9)


def test_kept_figures_survive_a_torn_line(tmp_path: Path) -> None:
    """What an interrupt cut off is measured again; lines of an older key are out of date."""
    results, place = Results(tmp_path), Place("BSD68", "50 % of pixels", "BM3D")
    for image, key in (("a", "old"), ("a", "new"), ("b", "new")):
        results.add(place, image, key, {"psnr_db": 30.0})
    path = tmp_path / "BSD68" / "50 % of pixels" / "BM3D.jsonl"
    path.write_text(path.read_text() + '{"image": "c", "key": "new", "psn')
    assert results.known(place).keys() == {"a", "b"}
    assert results.known(place, "old") == {"a": {"psnr_db": 30.0}}
    assert results.places() == [place]
    results.add(place, "c", "new", {"psnr_db": 1.0})
    assert results.known(place).keys() >= {"a", "b"}


def test_settings_are_chosen_on_other_photographs(data: Path, tmp_path: Path) -> None:
    """The best of the grid there, for each level and number of channels; chosen once."""
    tried: list[float] = []

    def restore(_task: object, seen: object, setting: float) -> Restored:
        tried.append(setting)
        return Restored(seen.y * np.float32(setting))  # type: ignore[attr-defined]

    Image.fromarray(np.full((300, 280, 3), 128, np.uint8)).save(data / "photos/dev/cid22/c.png")
    method = Method("scaled", lambda _: True, restore, (0.5, 1.0, 2.0), kept="1")
    path = tmp_path / "settings.json"
    assert Settings(data, path, 0).of(method, gaussian(5.0).task, 3) == 1.0
    assert len(tried) == 3
    assert Settings(data, path, 0).of(method, gaussian(5.0).task, 3) == 1.0
    assert len(tried) == 3
    Settings(data, path, 0).of(method, gaussian(5.0).task, 1)
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize("name", ["total variation", "non-local means", "BM3D"])
@pytest.mark.parametrize("channels", [1, 3])
def test_classical_methods_restore_whole_pictures(name: str, channels: int) -> None:
    """Grey and colour come nearer to the truth, in the shape that was sent."""
    for package in ("skimage", "bm3d") if name == "BM3D" else ("skimage",):
        pytest.importorskip(package, reason="needs the extra evaluation")
    method, case = next(one for one in rivals() if one.name == name), gaussian(25.0)
    x, seen = case.spoilt(picture(channels), 0)
    found = method.restore(case.task, seen, 0.8 if name != "BM3D" else 0.0).images
    assert found.shape == x.shape
    assert psnr(found, x).item() > psnr(seen.y.clip(0.0, 1.0), x).item() + 3.0


def test_channels_are_restored_jointly() -> None:
    """The function of `jointly` gets a plane of a grey image, and all channels of one in colour."""
    shapes = []

    def look(y: np.ndarray, _level: float, _setting: float) -> np.ndarray:
        shapes.append(y.shape)
        return y

    for channels in (1, 3):
        case = gaussian(10.0)
        jointly(look)(case.task, case.spoilt(picture(channels), 0).seen, 0.0)
    assert shapes == [SIZE, (3, *SIZE)]


def test_tables_leave_out_what_was_not_measured() -> None:
    """Rows and columns without numbers; nothing at all says so."""
    lines = table(["", "a", "b"], [["x", "1", ""], ["y", "", ""]])
    assert lines == ["|  | a |", "|---|--:|", "| x | 1 |", ""]
    assert table(["", "a"], [["x", ""]]) == ["Not measured yet.", ""]


def timed(part: str, what: str, seconds: float, processor_s: float) -> dict[str, str]:
    """A call for a grey image of 1000 x 1000 pixels and 500 GFLOP, a fifth of them in int8."""
    known = {"part": part, "what": what, "image": "grey", "side": "1000", "gflop": "500", "eight_bits": "0.2"}
    return {**known, "seconds": f"{seconds}", "processor_s": f"{processor_s}", "load": "1.5"}


def test_the_page_gets_the_tables_of_speed(tmp_path: Path) -> None:
    """Rates of graphs are of the median processor time; what stands around the sections stays."""
    page = tmp_path / "photographs.md"
    page.write_text("# Page\n\n## Seconds and memory\n\nNot measured yet.\n\n## How\n\n- So.\n")
    calls = [timed("graphs", "DnCNN, 17 layers", 9.0, seconds) for seconds in (4.0, 5.0, 90.0)]
    calls += [timed("tiles", "two sessions", seconds, 3.0) for seconds in (1.25, 2.5, 4.0)]
    with (tmp_path / speed.SPEED).open("w", newline="") as file:
        writer = csv.DictWriter(file, speed.TIMED)
        writer.writeheader()
        writer.writerows(calls)
    speed.renew(tmp_path)
    speed.renew(tmp_path)
    text = page.read_text()
    assert text.startswith("# Page\n\n## Seconds and memory\n\nNot measured yet")
    assert text.endswith("## How\n\n- So.\n")
    assert text.count("## Megapixels a second") == text.count("## How") == 1
    # 1 megapixel and 500 GFLOP in 5 s; the PSNR is the paper's.
    assert "| DnCNN, 17 layers | grey | 29.23 | 500 | 20% | 5.00 | 0.200 | 100 |" in text
    assert "| two sessions | grey | 1.25 | 2.50 | 3.00 |" in text


def test_a_page_without_the_headings_is_an_error(tmp_path: Path) -> None:
    """It names the command that makes the page."""
    (tmp_path / "photographs.md").write_text("# Page\n")
    with pytest.raises(ValueError, match="experiments restore"):
        speed.renew(tmp_path)


def test_a_set_that_is_absent_is_named(tmp_path: Path) -> None:
    """With the folder, and the option and variable that name it."""
    with pytest.raises(DataError, match=r"Set12; --data \(or VAE_DATA\)"):
        sets.load(tmp_path, "Set12")


def test_the_pages_of_a_service(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every measurement of every set goes over HTTP; a second run measures what is missing alone."""
    pytest.importorskip("skimage", reason="needs the extra evaluation")
    free_version(tmp_path / "models/free/1", (1, 3), graphs=("encoder", "decoder", "restoration"))
    with started(VAE_MODELS=str(tmp_path / "models")) as (_, url):
        common = ["--url", url, "--data", str(data), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
        command = ["restore", *common, "--methods", "as sent", "ours*", "bi*", "--set"]
        assert main([*command, "BSD68", "CBSD68", "W2S", "--limit", "1"]) == 0, capsys.readouterr().err
        assert "BSD68, block, ours free refined: " in capsys.readouterr().out  # what a model refuses is left out
        first = kept(tmp_path)
        assert main([*command, "BSD68", "W2S", "--measure", "noise", "missing", "micrographs"]) == 0
    second = kept(tmp_path)
    assert first.keys() == second.keys()
    assert {len(lines) for lines in first.values()} == {1}
    for path, lines in second.items():
        assert lines[:1] == first[path]
        assert len({json.loads(line)["image"] for line in lines}) == len(lines)
    assert len(second[tmp_path / "runs/restore/photographs/BSD68/Gaussian 25/ours free.jsonl"]) == 2
    page = (tmp_path / "out/photographs.md").read_text()
    with (tmp_path / "out/photographs.csv").open() as file:
        rows = {(row["set"], row["case"], row["method"]): row for row in csv.DictReader(file)}
    ours, part = (rows[name, "Gaussian 25", "ours free"] for name in ("BSD68", "CBSD68"))
    assert (ours["images"], part["images"]) == ("2", "1")
    assert f"| {float(ours['psnr_db']):.2f} |" in page
    assert f"| {float(part['psnr_db']):.2f} (1) |" in page
    assert "*quoted:* SwinIR" in page
    for name in ("already restored", "inverted", "ISO 3200", "JPEG 10", "block", "x4"):
        assert f"{name} |" in page
    micrographs = (tmp_path / "out/micrographs.md").read_text()
    assert "| *baseline:* BM3D in a stabilising transform | 31.00 | 34.00 | 32.50 | 2 |" in micrographs
    assert "**ours free auto**" in micrographs


def test_an_interrupted_command_goes_on(data: Path, tmp_path: Path) -> None:
    """Ctrl-C ends it with 130 and one line; the images that it has measured are not measured again."""
    pytest.importorskip("bm3d", reason="needs the extra evaluation")
    common = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    command = ["restore", "--set", "BSD68", "CBSD68", "--measure", "noise", "--methods", "BM3D", *common]
    process = subprocess.Popen([sys.executable, "-m", "experiments", *command], cwd=ROOT, stderr=PIPE, text=True)
    while not (first := kept(tmp_path)) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in said.splitlines()[-1]
    assert main([*command, "--sigma", "25"]) == 0
    for path, lines in first.items():
        assert kept(tmp_path)[path][: len(lines)] == lines
    names = [json.loads(line)["image"] for line in kept(tmp_path)[path.parents[1] / "Gaussian 25" / "BM3D.jsonl"]]
    assert sorted(names) == ["a", "b"]


def kept(folder: Path) -> dict[Path, list[str]]:
    return {path: path.read_text().splitlines() for path in (folder / "runs").rglob("*.jsonl")}


def test_the_data_s_own_figures_come_out(real_data: Path) -> None:
    """PSNR of the first noisy frame of W2S after affine alignment is that of its table."""
    (field,) = sets.load(real_data, "W2S", 1)
    with (real_data / "micrographs/w2s/baselines.csv").open() as file:
        known = next(csv.DictReader(file))
    assert known["image"] == field.name
    assert field.y is not None
    assert affine_psnr(field.y[None], field.x[None]) == pytest.approx(float(known["noisy"]), abs=2e-3)
