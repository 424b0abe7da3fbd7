"""The restorers that this project's are compared with."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from experiments.comparisons import unet
from experiments.comparisons.gaussian_conditional import ImageGaussian
from experiments.comparisons.methods import by_unet, rivals
from training.data import Digits, as_float
from training.errors import DependencyError
from training.evaluation.measures import psnr
from training.evaluation.tasks import SUBJECTS, noise
from training.extras import needed


def test_the_conditional_is_bayes_rule() -> None:
    """E[x | y] of the joint precision of x and y, solved as a whole, for any operator."""
    generator = np.random.default_rng(0)
    factor, operator = generator.standard_normal((5, 5)), generator.standard_normal((3, 5))
    gaussian, noise_variance = ImageGaussian(generator.standard_normal(5), factor @ factor.T + np.eye(5)), 0.3
    y = generator.standard_normal((2, 3))
    precision = np.linalg.inv(gaussian.covariance) + operator.T @ operator / noise_variance
    right = np.linalg.solve(gaussian.covariance, gaussian.mean) + y @ operator / noise_variance
    np.testing.assert_allclose(gaussian.given(y, operator, noise_variance), np.linalg.solve(precision, right.T).T)


def test_pixels_seen_exactly_leave_the_textbook_s_conditional() -> None:
    """mean_a + C_ab C_bb^-1 (y - mean_b), by hand on two pixels."""
    gaussian = ImageGaussian(np.array([1.0, -1.0]), np.array([[2.0, 0.6], [0.6, 0.5]]))
    found = gaussian.given(np.array([[0.5]]), np.array([[0.0, 1.0]]), 1e-12)
    np.testing.assert_allclose(found, [[1.0 + 0.6 / 0.5 * 1.5, 0.5]], rtol=1e-6)


def test_mean_and_covariance_are_those_of_the_images() -> None:
    """As numpy has them."""
    x = np.random.default_rng(1).random((200, 1, 3, 2), np.float32)
    gaussian = ImageGaussian.of(x)
    np.testing.assert_allclose(gaussian.mean, x.reshape(200, 6).mean(0), rtol=1e-5)
    np.testing.assert_allclose(gaussian.covariance, np.cov(x.reshape(200, 6).T, bias=True), atol=1e-6)


def test_the_unet_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Interrupted half-way it goes on to the weights of an undisturbed training, and it removes noise."""
    images = Digits(dataset="digits").load(tmp_path)
    steps = iter(range(1, 10**6))

    def interrupt(*_: Any) -> None:
        if next(steps) == 30:
            signal.raise_signal(signal.SIGTERM)

    handle = register_optimizer_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        unet.trained(images, tmp_path / "stopped", 12, {"dataset": "digits"})
    handle.remove()
    resumed = unet.trained(images, tmp_path / "stopped", 12, {"dataset": "digits"})
    undisturbed = unet.trained(images, tmp_path / "undisturbed", 12, {"dataset": "digits"})
    for mine, theirs in zip(resumed.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    x = as_float(images.test[:50]).numpy()
    (task,) = noise("0.25")
    seen = task.seen(x, 0)
    restored = by_unet(undisturbed).restore(task, seen, 0.0).images
    assert psnr(restored, x).mean() > psnr(seen.y.clip(0.0, 1.0), x).mean() + 0.7


@pytest.mark.parametrize("name", ["total variation", "non-local means", "Wiener", "median", "biharmonic", "bicubic"])
def test_every_classical_rival_is_one(name: str, tmp_path: Path) -> None:
    """On a task that is its own it comes nearer to the image than what was seen."""
    pytest.importorskip("skimage", reason="needs the extra evaluation")
    images = Digits(dataset="digits").load(tmp_path)
    method = next(method for method in rivals(images, 0) if method.name == name)
    x = as_float(images.test[:20]).numpy()
    for task in filter(method.does, SUBJECTS["digits"].tasks):
        seen = task.seen(x, 0)
        reached = max(psnr(method.restore(task, seen, s).images, x, seen.missing).mean() for s in method.settings)
        before = np.repeat(np.repeat(seen.y, task.factor, 2), task.factor, 3).clip(0.0, 1.0)
        if task.family != "masking":  # nobody who does not know which pixels are missing does well
            assert reached > psnr(before, x, seen.missing).mean(), task.name


def test_the_gaussian_conditional_fills_in(tmp_path: Path) -> None:
    """Missing halves better than the mean image does, super-resolution better than repeated pixels."""
    images = Digits(dataset="digits").load(tmp_path)
    method = next(method for method in rivals(images, 0) if method.name == "Gaussian conditional")
    x, mean = as_float(images.test).numpy(), as_float(images.train).numpy().mean(0)
    tasks = {task.name: task for task in SUBJECTS["digits"].tasks}
    for name in ("bottom half missing", "scattered pixels missing", "super-resolution x2"):
        seen = tasks[name].seen(x, 0)
        simple = mean + 0 * x if seen.mask is not None else np.repeat(np.repeat(seen.y, 2, 2), 2, 3)
        found = psnr(method.restore(tasks[name], seen, 0.0).images, x, seen.missing)
        assert found.mean() > psnr(simple, x, seen.missing).mean() + 0.5, name


def test_what_is_not_installed_is_named_with_its_extra() -> None:
    """One line that says how to get it."""
    with pytest.raises(DependencyError, match=r"no_such_package .*pip install '\.\[evaluation\]'"):
        needed("no_such_package.restoration")
