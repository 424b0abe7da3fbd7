"""The model card: README.md and its picture in a version's folder, written from what the version holds."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.contract import manifest as manifests
from service.contract.manifest import File, Manifest, ManifestError
from training.__main__ import main
from training.canvas import CAPTION, CELL, GAP
from training.config import kind_of, load, load_as
from training.errors import ConfigError
from training.evaluation.card import NOT_STATED, text
from training.export.card_sheet import MOST_BYTES, blocks

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the smallest shipped version."""
    copy = tmp_path / "mnist-2d" / "1"
    shutil.copytree(MODELS / "mnist-2d" / "1", copy)
    return copy


def test_export_writes_a_card(digits_models: Path) -> None:
    """With the test figures and their errors, data and licence, curl, and a PNG that is small."""
    folder = digits_models / "digits" / "1"
    manifest, card = manifests.read(folder), (folder / "README.md").read_text()
    assert card == text(manifest, ["sheet.png"])
    quality = manifest.quality
    for name in ("test_nll", "test_elbo"):
        error = quality[f"{name}_standard_error_nats"]
        assert f"{quality[f'{name}_nats']:g} +- {error:g} nats an image" in card
    row = quality["restoration"]["gaussian"]["0.25"]
    assert f"| gaussian | 0.25 | {row['noisy_db']:.1f} | {row['restored_db']:.1f} +- " in card
    assert "CC BY 4.0" in card
    assert "curl " in card
    sheet = (folder / "sheet.png").read_bytes()
    assert len(sheet) <= MOST_BYTES
    with Image.open(io.BytesIO(sheet)) as picture:  # four rows of golden images, and two of samples
        assert picture.size == (4 * (CELL + GAP) + GAP, 5 * (CAPTION + 2 * GAP) + 6 * (CELL + GAP) + GAP)
    assert {entry.file for entry in manifest.card_files()} == {"README.md", "sheet.png"}


def test_the_pictures_are_what_the_graphs_compute(digits_models: Path) -> None:
    """Reconstructions and restored images equal the golden answers, and the images the golden inputs."""
    folder = digits_models / "digits" / "1"
    found = blocks(manifests.read(folder), folder)
    with np.load(folder / "golden.npz") as golden:
        for caption, key in (("images", "encoder/x"), ("reconstructions", "decoder/x_mean"),
                             ("corrupted", "correction/y"), ("restored", "correction/restored")):  # fmt: skip
            np.testing.assert_allclose(found[caption], golden[key], atol=1e-5)
    assert found["samples"].shape == (8, 1, 8, 8)


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/*/manifest.json")), ids=lambda path: path.parts[-3])
def test_the_shipped_cards_are_those_of_their_manifests(path: Path) -> None:
    """Each has a card of its figures, a picture, and the words of its TOML."""
    manifest = manifests.read(path.parent)
    assert (path.parent / "README.md").read_text() == text(manifest, ["sheet.png"])
    assert all(manifests.has_digest(path.parent, entry, MOST_BYTES) for entry in manifest.card_files())
    config = CONFIGS / f"{manifest.name}.toml"
    assert manifest.training["card"] == load_as(kind_of(config), config).card.model_dump(exclude_none=True)
    assert NOT_STATED not in text(manifest)


def test_the_words_of_the_toml_are_the_cards(folder: Path, tmp_path: Path) -> None:
    """Every key of [card] stands in the card, then in the manifest, so that a later card keeps it; graphs stay."""
    words = {key: f"Some words on {key}." for key in type(load(CONFIGS / "digits.toml").card).model_fields}
    assert len(words) == 6
    config = tmp_path / "run.toml"
    table = "".join(f'{key} = "{value}"\n' for key, value in words.items())
    config.write_text((CONFIGS / "digits.toml").read_text() + f"\n[card]\n{table}")
    before = manifests.read(folder)
    for more in (["--config", str(config)], []):
        assert main(["card", str(folder), *more]) == 0
        card = (folder / "README.md").read_text()
        assert all(value in card for value in words.values())
    after = manifests.read(folder)
    assert (after.fingerprint, after.graphs, after.training["card"]) == (before.fingerprint, before.graphs, words)
    assert all(manifests.has_digest(folder, entry, MOST_BYTES) for entry in after.card_files())


@pytest.mark.usefixtures("own_signals")
def test_a_folder_without_a_version_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line."""
    assert main(["card", str(tmp_path)]) == 1
    assert str(tmp_path / "manifest.json") in capsys.readouterr().err


def changed(**keys: object) -> Manifest:
    """The manifest of a shipped version with other values."""
    content = json.loads((MODELS / "mnist-2d" / "1" / "manifest.json").read_text())
    return manifests.parse(json.dumps({**content, **keys}).encode())


def test_a_card_of_any_manifest() -> None:
    """Figures and settings that another program wrote otherwise are left out; unusable words are named."""
    odd = {"images": "many", "test_nll_nats": None, "restoration": {"gaussian": 3}, "parity": 1e-6}
    card = text(changed(quality=odd, training={"seconds": 3, "train_images": "few"}, dataset="mine"))
    assert "`parity`: 1e-06" in card
    assert "many" not in card
    assert NOT_STATED in card
    assert "None were measured" in text(changed(quality={}))
    with pytest.raises(ConfigError, match=r"training\.card"):
        text(changed(training={"card": {"colour": "red"}}))


def test_the_card_is_one_file_of_one_name() -> None:
    """README.md alone; its pictures have plain names of their own."""
    entry = {"file": "README.md", "sha256": "0" * 64}
    assert changed(card=entry).card_files()[0].file == "README.md"
    for wrong in ({**entry, "file": "readme.md"}, {**entry, "pictures": [{**entry, "file": "../a.png"}]},
                  {**entry, "pictures": [File(file="encoder.onnx", sha256="0" * 64).model_dump()]}):  # fmt: skip
        with pytest.raises(ManifestError):
            changed(card=wrong)
