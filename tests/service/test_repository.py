"""The model repository: what is served, and what is refused at start."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.contract.manifest import digest
from service.errors import StartError, UnknownModel
from service.operations.inference.vae import reconstruct_rows
from service.repository.repository import Repository
from service.repository.selection import version_key
from service.runtime.model import Model


def opened(folder: Path, default: str = "") -> Repository:
    return Repository.open(folder, default, "CPUExecutionProvider", 1, 8)


@pytest.fixture
def copy(digits_models: Path, tmp_path: Path) -> Path:
    """A repository that a test may spoil."""
    shutil.copytree(digits_models, tmp_path / "models")
    return tmp_path / "models"


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_latest_version_is_the_largest_number(copy: Path) -> None:
    """10 is later than 2, and each is served under its name."""
    for version in ("2", "10"):
        shutil.copytree(copy / "digits" / "1", copy / "digits" / version)
        rewrite(copy / "digits" / version, version=version)
    repository = opened(copy)
    assert repository.find(None, None).manifest.version == "10"
    assert repository.find("digits", "2").manifest.version == "2"
    with pytest.raises(UnknownModel, match="1, 2, 10"):
        repository.find("digits", "3")


def test_versions_are_ordered_as_a_person_would() -> None:
    """Numbers by value, part by part."""
    assert sorted(["1.10", "1.9", "2", "1", "10"], key=version_key) == ["1", "1.9", "1.10", "2", "10"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "no model repository"),
        (lambda p: shutil.rmtree(p / "digits"), "holds no model"),
        (lambda p: (p / "digits/1/manifest.json").unlink(), "a model version is a folder with a manifest.json"),
        (lambda p: (p / "digits/1/manifest.json").write_text("{"), "not JSON"),
        (lambda p: rewrite(p / "digits/1", schema_version=99), "upgrade the service"),
        (lambda p: (p / "digits/1/decoder.onnx").write_bytes(b"x"), "does not match the SHA-256"),
        (lambda p: (p / "digits/1/decoder.onnx").unlink(), "decoder.onnx: No such file"),
        (lambda p: (p / "digits/1").rename(p / "digits/2"), "name the folders after them"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(copy: Path, spoil: Any, says: str) -> None:
    """The message names the file and what to do."""
    spoil(copy)
    with pytest.raises(StartError) as caught:
        opened(copy)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_reproduce_its_golden_vectors_is_refused(copy: Path) -> None:
    """Even where every digest matches."""
    folder = copy / "digits" / "1"
    with np.load(folder / "golden.npz") as file:
        golden = dict(file)
    golden["decoder/x_mean"] = golden["decoder/x_mean"] + np.float32(0.01)
    np.savez(folder / "golden.npz", **golden)
    entry = json.loads((folder / "manifest.json").read_text())["golden"]
    rewrite(folder, golden={**entry, "sha256": digest((folder / "golden.npz").read_bytes())})
    with pytest.raises(StartError, match=r"decoder is off its golden vectors by 0\.01"):
        opened(copy)


def test_an_unknown_default_is_refused(copy: Path) -> None:
    """With the names there are."""
    with pytest.raises(StartError, match="the models are digits"):
        opened(copy, "mnist")


def test_a_half_written_version_is_not_seen(copy: Path) -> None:
    """The trainer writes into a hidden folder first."""
    (copy / "digits" / ".2.abc").mkdir()
    assert list(opened(copy).models["digits"]) == ["1"]


def test_warm_programs_know_their_cost(model: Model) -> None:
    """After the warm-up, more rows cost no less, and a program that nobody has timed is never cheap."""
    program = model.plan("reconstruct", reconstruct_rows, 0, model.latent_at)
    assert 0 < program.cost_s(1) <= program.cost_s(8) < 1
    assert model.plan("reconstruct", reconstruct_rows, 3, model.latent_at).cost_s(1) == math.inf
