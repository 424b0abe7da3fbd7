"""`python -m training` as users run it: stopped, killed, resumed, and errors in one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from service.contract import manifest
from service.contract.cores import cpu_count
from tests.faults.conftest import eventually
from training.__main__ import _changes, _parser, main
from training.config import load
from training.loop.stages import vae_stage
from training.loop.trainer import AVERAGED_STEPS, train
from training.pipeline import Workshop, free_cores

ROOT = Path(__file__).parents[2]
STEPS = 40 * (1294 // 50)
TOML = """
name = "tiny"
seed = 5
[data]
dataset = "digits"
[model]
latent_dim = 4
[model.network]
architecture = "mlp"
hidden = [32]
[train]
epochs = 40
batch_size = 50
[evaluation]
draws = 5
images = 50
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of 1,000 steps: a second or two."""
    path = tmp_path / "tiny.toml"
    path.write_text(TOML)
    return path


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """The command line installs a handler of SIGTERM; the tests' process gets its own back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def arguments(config: Path) -> list[str]:
    """`fit` into the test's own folders."""
    folder = config.parent
    return ["fit", str(config), "--data", str(folder), "--out", str(folder / "models"), "--run", str(folder / "run")]


def log_lines(folder: Path) -> int:
    """Number of lines in the run's log."""
    with contextlib.suppress(FileNotFoundError):
        return len((folder / "log.jsonl").read_text().splitlines())
    return 0


def stopped_half_way(config: Path, how: signal.Signals) -> tuple[int, str]:
    """Start `fit`, wait until it has trained for a while, send the signal; its exit status and standard error."""
    command = [sys.executable, "-m", "training", *arguments(config), "--threads", "1", "--device", "cpu"]
    folder = config.parent / "run"
    before, deadline = log_lines(folder), time.monotonic() + 60.0
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while log_lines(folder) < before + 2 and process.poll() is None:
            assert time.monotonic() < deadline, "it does not start to train"
            time.sleep(0.005)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60.0)
    return process.returncode, errors


def weights(folder: Path) -> dict[str, Any]:
    """The checkpoint without the time it took."""
    state: dict[str, Any] = torch.load(folder / "vae.pt", weights_only=True)
    del state["seconds"]
    return state


def test_run_that_is_stopped_and_killed_ends_in_the_same_bits(config: Path, tmp_path: Path) -> None:
    """SIGINT and SIGTERM leave a checkpoint, SIGKILL the one before; the last `fit` exports the same weights.

    Weights and their average are then those of a run that nobody disturbed, bit for bit.
    """
    partial = tmp_path / "run"
    for how in (signal.SIGINT, signal.SIGKILL):
        before = (partial / "vae.pt").read_bytes() if (partial / "vae.pt").exists() else None
        status, errors = stopped_half_way(config, how)
        if how == signal.SIGKILL:
            assert (partial / "vae.pt").read_bytes() == before
        else:
            assert status == 130, errors
            assert errors.splitlines()[-1].startswith("vae-train: interrupted")
            assert "Traceback" not in errors
        assert 0 < weights(partial)["step"] < STEPS
    assert not (tmp_path / "models" / "tiny" / "1").exists()

    assert main([*arguments(config), "--device", "cpu"]) == 0
    run = load(config)
    workshop = Workshop.open(run, tmp_path, tmp_path / "undisturbed", torch.device("cpu"))
    stage = vae_stage(run, workshop.images.shape, workshop.device)
    train(stage, workshop.images.train, workshop.folder, held_out=workshop.images.validation)
    found, expected = weights(partial), weights(tmp_path / "undisturbed")
    assert (found["step"], found["finished"], found["kept"]) == (expected["step"], True, expected["kept"])
    for part in ("module", "averaged"):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            assert torch.equal(found[part][name], tensor), f"{part} {name}"
    lines = [json.loads(line) for line in (partial / "log.jsonl").read_text().splitlines()]
    assert all({"elbo", "kl", "log_likelihood", "step"} <= line.keys() or "held_out_elbo" in line for line in lines)
    assert {line["epoch"] for line in lines if "held_out_elbo" in line} == set(range(1, 41))
    assert manifest.read(tmp_path / "models" / "tiny" / "1").quality["images"] == 50


def test_termination_is_an_interrupt_too(config: Path, tmp_path: Path) -> None:
    """SIGTERM, as a container's stop sends it, exits with 130 and leaves a checkpoint in which all parts agree."""
    steps = iter(range(1, 10**6))

    def terminate(*_: Any) -> None:
        if next(steps) == 40:
            signal.raise_signal(signal.SIGTERM)

    handle = register_optimizer_step_post_hook(terminate)
    try:
        assert main([*arguments(config), "--device", "cpu"]) == 130
    finally:
        handle.remove()
    state = weights(tmp_path / "run")
    assert 39 <= state["step"] <= 40
    assert int(state["averaged"]["n_averaged"]) == state["step"] // AVERAGED_STEPS
    assert {int(moments["step"]) for moments in state["optimisers"][0]["state"].values()} == {state["step"]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["fit", "nowhere.toml"], "cannot read nowhere.toml"),
        (["fit", "CONFIG", "--run", "FILE/run"], "FILE"),
        (["fit", "CONFIG", "--out", "FILE/models"], "FILE"),
        (["evaluate", "CONFIG"], "python -m training fit"),
        (["export", "CONFIG"], "python -m training fit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_whatever_is_wrong_is_one_line_and_status_1(
    wrong: list[str],
    message: str,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """A command that cannot be done prints one line that names the cause, and nothing else."""
    file = tmp_path / "file"
    file.write_text("not a folder")
    named = [part.replace("CONFIG", str(config)).replace("FILE", str(file)) for part in wrong]
    apart = [] if "--run" in named else ["--run", str(tmp_path / "run")]
    assert main([*named, *apart, "--device", "cpu"]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("vae-train: ")
    assert message.replace("FILE", str(file)) in errors[0]


def test_evaluate_prints_json_and_fresh_starts_again(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`evaluate` prints the figures as JSON; changed settings are refused, and accepted again with --fresh."""
    config.write_text(TOML.replace("epochs = 40", "epochs = 1"))
    assert main([*arguments(config), "--device", "cpu"]) == 0
    capsys.readouterr()
    run = ["--run", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["evaluate", str(config), *run, "--draws", "3", "--images", "20"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["images"], figures["importance_samples"]) == (20, 3)
    assert main(["evaluate", str(config), *run, "--images", "180", "--share", "2/2"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 80
    with pytest.raises(SystemExit):
        main(["evaluate", str(config), *run, "--share", "3/2"])
    assert "3/2 is no share" in capsys.readouterr().err

    config.write_text(TOML.replace("epochs = 40", "epochs = 2").replace("seed = 5", "seed = 6"))
    assert main([*arguments(config), "--device", "cpu"]) == 1
    assert "--replace" in capsys.readouterr().err
    assert main([*arguments(config), "--device", "cpu", "--replace"]) == 1
    assert "other settings (seed)" in capsys.readouterr().err
    assert main([*arguments(config), "--device", "cpu", "--replace", "--fresh"]) == 0
    training = manifest.read(tmp_path / "models" / "tiny" / "1").training
    assert training["settings"]["train"]["epochs"] == 2


def test_a_finished_run_goes_on_for_more_epochs(config: Path, tmp_path: Path) -> None:
    """More epochs, by option or TOML, continue a finished run; fewer train nothing; the manifest has the number."""

    def workshop(epochs: int | None = None) -> Workshop:
        run = load(config, {"train": {"epochs": epochs}})
        return Workshop.open(run, tmp_path, tmp_path / "run", torch.device("cpu"))

    def trained() -> tuple[int, int]:
        told = workshop()._training()["settings"]["train"]["epochs"]
        return weights(tmp_path / "run")["step"] // (1294 // 50), told

    for asked, found in ((1, 1), (3, 3), (2, 3)):
        workshop(asked).train()
        assert trained() == (found, found)
        assert workshop(asked).vae() is not None
    config.write_text(TOML.replace("epochs = 40", "epochs = 4"))
    workshop().train()
    assert trained() == (4, 4)
    stopped = torch.load(tmp_path / "run" / "vae.pt", weights_only=True) | {"finished": False}
    torch.save(stopped | {"step": stopped["step"] - 1}, tmp_path / "run" / "vae.pt")  # of a run of many more epochs
    workshop(1).train()
    assert trained() == (4, 4)


def test_what_restores_is_trained_anew_for_another_vae(tmp_path: Path) -> None:
    """Restoration is trained anew after the VAE was trained further; alone it continues."""

    def steps(epochs: int, restoration_epochs: int) -> tuple[int, int]:
        changes = {"epochs": epochs}, {"train": {"epochs": restoration_epochs}}
        run = load(ROOT / "training/configs/digits.toml", dict(zip(("train", "restoration"), changes, strict=True)))
        Workshop.open(run, tmp_path, tmp_path, torch.device("cpu")).train()
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        (tmp_path / "log.jsonl").unlink()
        epochs_of = {name: [one["epoch"] for one in lines if one["stage"] == name and "held_out_elbo" in one]
                     for name in ("vae", "restoration")}  # fmt: skip
        return len(epochs_of["vae"]), len(epochs_of["restoration"])

    assert steps(1, 1) == (1, 1)
    assert steps(1, 2) == (0, 1)
    assert steps(2, 2) == (1, 2)


def test_epochs_are_checked_as_in_the_toml(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong number is named with its table; a run without the second stage has no epochs of it."""
    assert main([*arguments(config), "--epochs", "0"]) == 1
    assert "train.epochs" in capsys.readouterr().err
    assert main([*arguments(config), "--restoration-epochs", "3"]) == 1
    assert "restoration.network" in capsys.readouterr().err


def test_epochs_of_the_command_line_are_all_that_is_trained(config: Path) -> None:
    """They replace the TOML's least number of steps as well as its epochs, in each stage."""
    config.write_text(TOML.replace("epochs = 40", "epochs = 40\nleast_steps = 5000"))
    for options, expected in (([], (40, 5000)), (["--epochs", "2"], (2, 0))):
        settings = load(config, _changes(_parser().parse_args([*arguments(config), *options]))).train
        assert (settings.epochs, settings.least_steps) == expected


def test_busy_cores_are_left_alone() -> None:
    """By default there is a thread for each core that idles, and one where none does."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        eventually(lambda: free_cores() == 1)
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    assert 1 <= free_cores() <= cpu_count()
