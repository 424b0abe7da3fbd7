"""One TOML a run: misspelt and invalid keys are refused before training."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from training.config import ConditionalRun, Run, kind_of, load, load_as
from training.errors import ConfigError
from training.loop.stages import vae_stage

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
EVERY_TABLE = [
    (),
    ("data",),
    ("model",),
    ("model", "network"),
    ("train",),
    ("restoration",),
    ("restoration", "network"),
    ("restoration", "level_network"),
    ("restoration", "train"),
    ("evaluation",),
]
CONV = {"architecture": "conv"}
FOLDER = {"dataset": "folder", "height": 8, "width": 8}


def to_toml(tables: dict[str, Any], prefix: str = "") -> str:
    """Write a table as TOML."""
    plain = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for key, value in tables.items():
        if isinstance(value, dict):
            lines += [f"[{prefix}{key}]", to_toml(value, f"{prefix}{key}.")]
    return "\n".join(lines)


def changed(where: tuple[str, ...], value: Any, folder: Path) -> Path:
    """The digits' TOML with one value set."""
    tables: dict[str, Any] = tomllib.loads((CONFIGS / "digits.toml").read_text())
    table = tables
    for key in where[:-1]:
        table = table[key]
    table[where[-1]] = value
    path = folder / "run.toml"
    path.write_text(to_toml(tables))
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_config_loads(path: Path) -> None:
    """Every shipped TOML is valid and states what to expect of it in its first comment."""
    run = load_as(kind_of(path), path)
    assert (run.trunk.train if isinstance(run, ConditionalRun) else run.train).epochs > 0
    assert "Expected:" in path.read_text().splitlines()[0]


def test_unchanged_config_survives_the_tests_own_writer(tmp_path: Path) -> None:
    """What the tests below write is the shipped TOML but for the one change."""
    assert load(changed(("seed",), 1, tmp_path)) == load(CONFIGS / "digits.toml")


@pytest.mark.parametrize("table", EVERY_TABLE, ids=lambda table: ".".join(table) or "top level")
def test_unknown_key_is_an_error_wherever_it_stands(table: tuple[str, ...], tmp_path: Path) -> None:
    """A misspelt key in any table is a ConfigError naming the file, the table and the key."""
    path = changed((*table, "epohcs"), 3, tmp_path)
    with pytest.raises(ConfigError, match=r"run\.toml: .*epohcs") as caught:
        load(path)
    assert all(part in str(caught.value) for part in table)


BAD_VALUES: list[tuple[tuple[str, ...], Any]] = [
    (("name",), "../elsewhere"),
    (("name",), "Upper"),
    (("version",), ""),
    (("seed",), "one"),
    (("data", "dataset"), "imagenet"),
    (("model", "latent_dim"), 0),
    (("model", "likelihood"), "poisson"),
    (("model", "network", "architecture"), "transformer"),
    (("model", "network", "activation"), "gelu"),
    (("train", "epochs"), 0),
    (("train", "epochs"), 1.5),
    (("train", "batch_size"), -1),
    (("train", "learning_rate"), 0.0),
    (("train", "learning_rate"), -1e-3),
    (("train", "ema_decay"), 1.0),
    (("train", "warmup_steps"), -1),
    (("train", "gradient_norm"), 0.0),
    (("restoration", "train", "epochs"), 0),
    (("evaluation", "draws"), 0),
]


@pytest.mark.parametrize(("where", "value"), BAD_VALUES, ids=str)
def test_bad_value_is_named(where: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    """A value that makes no sense is a ConfigError naming its key."""
    with pytest.raises(ConfigError, match=where[-1] if where[-1] not in ("dataset", "architecture") else where[0]):
        load(changed(where, value, tmp_path))


IMPOSSIBLE: list[tuple[tuple[str, ...], Any]] = [
    (("model", "network", "hidden"), []),
    (("model", "network", "hidden"), [0]),
    (("model", "network"), {**CONV, "channels": []}),
    (("model", "network"), {**CONV, "channels": [0]}),
    (("model", "network"), {**CONV, "blocks": -1}),
    (("model", "network"), {**CONV, "head": 0}),
    (("data",), {**FOLDER, "height": 0}),
    (("data",), {**FOLDER, "width": -3}),
    (("data",), {**FOLDER, "test": 1.5}),
    (("data",), {**FOLDER, "validation": -0.1}),
    (("data",), {**FOLDER, "bits": 0}),
    (("data",), {**FOLDER, "bits": 17}),
    (("data", "test"), 1.0),
]


@pytest.mark.parametrize(("where", "value"), IMPOSSIBLE, ids=str)
def test_network_or_data_that_cannot_exist_is_refused(where: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    """No layers, layers of no width, images of no height, parts beyond the whole: a ConfigError, not a traceback."""
    with pytest.raises(ConfigError, match=where[0]):
        load(changed(where, value, tmp_path))


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A path that is not there is a ConfigError naming it."""
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe\x00", b"[a]\n[a]\n"], ids=["half", "not utf-8", "twice"])
def test_file_that_is_not_toml_is_named(content: bytes, tmp_path: Path) -> None:
    """What is not TOML, or not even text, is a ConfigError naming the file."""
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load(path)


def test_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    """Windows editors begin UTF-8 with one."""
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (CONFIGS / "digits.toml").read_bytes())
    assert load(path) == load(CONFIGS / "digits.toml")


def test_checkpoint_of_a_folder_outlives_new_settings() -> None:
    """A run's data are identified by the TOML's keys that differ from the defaults."""
    run = Run.model_validate(tomllib.loads((CONFIGS / "digits.toml").read_text()) | {"data": FOLDER})
    assert vae_stage(run, (3, 8, 8), torch.device("cpu")).identity["data"] == FOLDER


def test_missing_table_is_named(tmp_path: Path) -> None:
    """A run without [train] is a ConfigError naming it."""
    path = tmp_path / "run.toml"
    tables = tomllib.loads((CONFIGS / "digits.toml").read_text())
    del tables["train"]
    path.write_text(to_toml(tables))
    with pytest.raises(ConfigError, match="train: Field required"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"binarise": True, "model": {"likelihood": {"likelihood": "gaussian"}}}, "binarise = false"),
        ({"model": {"prior": {"prior": "vamp"}}, "train": {"objective": "wake_sleep"}}, "VampPrior"),
    ],
)
def test_settings_that_do_not_go_together_are_named(changes: dict[str, Any], says: str) -> None:
    """The message names the key to change."""
    content = tomllib.loads((CONFIGS / "digits.toml").read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValidationError, match=says):
        Run.model_validate(content)


@pytest.mark.parametrize(
    ("changes", "binary"),
    [
        ({}, True),
        ({"binarise": False}, False),
        ({"model": {"likelihood": {"likelihood": "gaussian"}}}, False),
        ({"data": {"dataset": "folder", "height": 8, "width": 8}}, False),
        ({"data": {"dataset": "folder", "height": 8, "width": 8}, "binarise": True}, True),
        ({"data": {"dataset": "mnist_static"}}, False),
        ({"data": {"dataset": "mnist"}}, True),
    ],
)
def test_pixels_are_binarised_where_they_are_digits(changes: dict[str, Any], binary: bool) -> None:
    """Digits are binarised by default, and `binarise` overrides it."""
    content = tomllib.loads((CONFIGS / "digits.toml").read_text())
    model = {**content["model"], **changes.get("model", {})}
    assert Run.model_validate({**content, **changes, "model": model}).binary is binary
