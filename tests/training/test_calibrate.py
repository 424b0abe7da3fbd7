"""`python -m training calibrate`: factors against known deviations, and the command with a service of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from numpy.typing import NDArray

from service.contract import manifest as manifests
from service.contract.calibration import APART, BESIDE, widened
from training.__main__ import main
from training.evaluation.calibrate import Asking, Told, factor_of
from training.evaluation.served import Answer, started
from training.evaluation.tasks import BLURRING, INPAINTING, Task

pytestmark = pytest.mark.usefixtures("own_signals")

Rows = NDArray[np.float32]
TRUE_STD = 0.04
GAUSSIAN = Task("Gaussian 0.1", "denoise", "gaussian", 0.1)


class Unsure:
    """A service whose pixels are `TRUE_STD` off, and whose std says so; it counts what it is asked."""

    def __init__(self, x: Rows) -> None:
        self.x, self.asked = x, 0

    def images(self, *_request: object, **_options: object) -> Answer:
        """The same answer to everything."""
        self.asked += 1
        off = TRUE_STD * np.random.default_rng(7).standard_normal(self.x.shape)
        outputs = {"images": (self.x + off).astype(np.float32), "std": np.full_like(self.x, TRUE_STD)}
        return Answer(outputs, None)


def asking(digits_models: Path, kept: Path, applied: dict[str, dict[str, float]]) -> tuple[Unsure, Asking]:
    x = np.random.default_rng(0).random((100, 1, 8, 8), np.float32)
    service = Unsure(x)
    return service, Asking(service.images, manifests.read(digits_models / "digits" / "1"), applied, x, 0, kept)


@pytest.mark.parametrize("said", [0.4, 1.0, 1.8])
def test_the_factor_makes_good_what_was_said_wrong(said: float) -> None:
    """Of normal errors whose deviations are said to be so many times what they are."""
    generator = np.random.default_rng(0)
    std = generator.uniform(0.03, 0.1, 20_000)
    x = std * generator.standard_normal(std.shape)
    told = Told(np.zeros_like(x), widened(std, np.float32(said)), x)
    assert factor_of(told) == pytest.approx(1.0 / said, rel=0.03)
    assert told.covered(factor_of(told)) == pytest.approx(0.9, abs=0.005)


def test_what_the_service_applies_already_is_taken_out(digits_models: Path, tmp_path: Path) -> None:
    """Where it is right because it doubles them, the factor is 2 again; and it is asked but once for each quality."""
    service, ask = asking(digits_models, tmp_path / "kept", {"fast": {"gaussian": 2.0}})
    first, again = (dict(ask.pixels(GAUSSIAN, "fast"))["gaussian"] for _ in range(2))
    assert factor_of(first) == factor_of(again) == pytest.approx(2.0, rel=0.05)
    assert service.asked == 1
    assert factor_of(dict(ask.pixels(GAUSSIAN, "refined"))["gaussian"]) == pytest.approx(1.0, rel=0.05)
    assert service.asked == 2


def test_pixels_are_sorted_as_the_service_does(digits_models: Path, tmp_path: Path) -> None:
    """Of the lower half, the first row lies beside what is seen; a blur is one way."""
    _, ask = asking(digits_models, tmp_path, {})
    sizes = {way: len(told.x) for way, told in ask.pixels(INPAINTING[1], "fast")}
    assert sizes == {BESIDE: 100 * 8, APART: 100 * 24}
    assert {way: len(told.x) for way, told in ask.pixels(BLURRING, "fast")} == {"blur": 100 * 64}


def test_a_service_is_calibrated(digits_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Manifest and card change, the fingerprint does not; nothing is left behind; what cannot be is said in a line.

    A signed version is signed anew.
    """
    models, runs, key = tmp_path / "models", tmp_path / "runs", tmp_path / "key.pem"
    folder = models / "digits" / "1"
    shutil.copytree(digits_models, models)
    private = Ed25519PrivateKey.generate()
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert main(["sign", str(folder), "--key", str(key)]) == 0
    before, files = manifests.read(folder), {path.name for path in folder.iterdir()}
    with started(VAE_MODELS=str(models)) as (_, url):
        command = ["calibrate", "--url", url, "--runs", str(runs), "--images", "30", "--models"]
        for wrong, says in ((["--model", "cats"], "no model cats is served"), ([], "names the folder")):
            assert main([*command, str(tmp_path), *wrong]) == 1
            assert says in capsys.readouterr().err
        assert main([*command, str(models)]) == 1
        assert "is signed; pass --key, which signs it anew" in capsys.readouterr().err
        assert main([*command, str(models), "--key", str(key)]) == 0
    assert f"wrote {folder / 'manifest.json'}" in capsys.readouterr().out
    after = manifests.read(folder)
    assert after.calibration is not None
    assert (
        after.model_copy(
            update={"calibration": None, "far_from_training": before.far_from_training, "card": before.card}
        )
        == before
    )
    assert "calibrated on 30 validation images" in (folder / "README.md").read_text()
    assert all(manifests.has_digest(folder, entry, 2**20) for entry in after.card_files())
    private.public_key().verify((folder / "manifest.json.sig").read_bytes(), (folder / "manifest.json").read_bytes())
    for quality in ("fast", "refined"):
        told = after.calibration.factors[quality]
        assert told.keys() == {*before.noise_families, BESIDE, APART, "shrink-2", "blur"}
    assert after.calibration.images == 30
    assert {path.name for path in folder.iterdir()} == files
    assert not list((runs / "calibrate").iterdir())
