"""`python -m experiments separate`: the other kinds of pictures, and how scores tell them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.comparisons.separate import OWN, SCORES, SeparateOptions, auroc, figures, kinds, page, rotated, sheared
from service.operations.registry import OPERATIONS

pytestmark = pytest.mark.usefixtures("own_signals")


def plan(data: Path) -> SeparateOptions:
    return SeparateOptions(data=data, url=None, models=data)


def test_other_pictures_are_what_they_are_called(tmp_path: Path) -> None:
    """In [0, 1], as many, of the same size; shuffling keeps every image's pixels, inverting turns them over."""
    x = np.random.default_rng(0).random((30, 1, 9, 7), np.float32) ** 3
    found = kinds(x, plan(tmp_path))
    assert all(rows.shape == x.shape and rows.dtype == np.float32 for rows in found.values())
    assert all(rows.min() >= 0.0 and rows.max() <= 1.0 for rows in found.values())
    shuffled = found["pixels shuffled"]
    np.testing.assert_array_equal(np.sort(shuffled.reshape(30, -1)), np.sort(x.reshape(30, -1)))
    assert (shuffled != x).mean() > 0.9
    np.testing.assert_allclose(found["inverted"] + x, 1.0, atol=1e-6)
    assert found["uniform noise"].mean() == pytest.approx(0.5, abs=0.02)
    again = kinds(x, plan(tmp_path))
    assert all((again[kind] == rows).all() for kind, rows in found.items())


def test_faces_are_resized(real_data: Path) -> None:
    """Where the data are there."""
    found = kinds(np.zeros((4, 1, 28, 28), np.float32), plan(real_data))
    assert found["Frey faces"].shape == (4, 1, 28, 28)
    assert found["Frey faces"].std() > 0.1


def test_turned_and_sheared_by_hand() -> None:
    """A quarter turn is numpy's; a shear leaves the middle row and moves the others in proportion."""
    x = np.random.default_rng(1).random((2, 1, 7, 7), np.float32)
    np.testing.assert_allclose(rotated(x, 90), np.rot90(x, axes=(2, 3)), atol=1e-5)
    line = np.zeros((1, 1, 9, 9), np.float32)
    line[..., 4] = 1.0
    slanted = sheared(line)[0, 0]
    np.testing.assert_array_equal(slanted[4], line[0, 0, 4])
    assert [int(slanted[row].argmax()) for row in (0, 2, 6, 8)] == [6, 5, 3, 2]


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    """All, none and half of them; against all pairs counted one by one, with ties."""
    assert auroc(np.array([2.0, 3.0]), np.array([0.0, 1.0, 1.5])) == 1.0
    assert auroc(np.array([-2.0]), np.array([0.0, 1.0])) == 0.0
    assert auroc(np.ones(3), np.ones(4)) == 0.5
    generator = np.random.default_rng(1)
    inside, outside = generator.integers(0, 9, 50), generator.integers(2, 12, 70)
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    assert auroc(inside, outside) == pytest.approx(np.mean(pairs))


def test_the_table_says_how_well_each_kind_is_told_apart(tmp_path: Path) -> None:
    """1 where every digit scores higher, 0 where none does; the digits' own row has none."""
    rising = {score: np.arange(4.0) for score in SCORES}
    scores = {OWN: rising, "lower": {score: v - 9.0 for score, v in rising.items()},
              "higher": {score: v + 9.0 for score, v in rising.items()}}  # fmt: skip
    rows = figures(scores)
    assert [row.get("auroc_elbo") for row in rows] == [None, 1.0, 0.0]
    assert rows[1]["mean_elbo"] == -7.5
    assert "| lower | 1.000 | 1.000 | 1.000 | -7.5 |" in page(rows, plan(tmp_path), "mnist 2, abc")


def test_scores_of_a_service_of_its_own(
    digits_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained digits are told from noise; a service without `score` is told so in one line."""
    command = ["separate", "--model", "dig*", "--models", str(digits_models), "--data", str(tmp_path)]
    status = main([*command, "--out", str(tmp_path), "--images", "50"])
    if "score" not in {operation.name for operation in OPERATIONS}:
        assert status == 1
        assert "no model of digits that offers score" in capsys.readouterr().err
        return
    assert status == 0, capsys.readouterr().err
    text = (tmp_path / "separation.md").read_text()
    noise = next(line for line in text.splitlines() if line.startswith("| uniform noise"))
    assert float(noise.split("|")[2]) > 0.9
    assert (tmp_path / "separation.png").read_bytes().startswith(b"\x89PNG")


def test_a_score_that_is_not_answered_is_left_out() -> None:
    """Grey images under Bernoulli pixels have a bound, and no likelihood."""
    values = np.arange(20.0)
    own, other = ({"elbo": values + k, "log_likelihood": values + k} for k in (100.0, 0.0))
    rows = figures({OWN: own, "lower": other})
    assert rows[1]["auroc_elbo"] == 1.0
    assert not [key for row in rows for key in row if "importance" in key]
