"""Two processes under torchrun train what one trains, also after an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from training.__main__ import main

ROOT = Path(__file__).parents[2]
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
epochs = 16
batch_size = 50
microbatches = 2
[evaluation]
draws = 5
images = 50
"""


def arguments(config: Path, run: Path) -> list[str]:
    """`fit` of the config, into folders of its own."""
    models = str(run.parent / f"{run.name}-models")
    return ["fit", str(config), "--data", str(run), "--out", models, "--run", str(run), "--device", "cpu"]


def two_processes(config: Path, run: Path) -> subprocess.Popen[bytes]:
    """The same command under torchrun, whose own options end at `--`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    command = [*torchrun, "training", *arguments(config, run), "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)


def weights(run: Path) -> torch.Tensor:
    """Weights of the averaged model."""
    state = torch.load(run / "vae.pt", weights_only=True)
    assert state["finished"]
    return torch.cat([value.flatten() for key, value in state["averaged"].items() if key.startswith("module.")])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 400 steps."""
    path = tmp_path_factory.mktemp("processes") / "tiny.toml"
    path.write_text(TOML)
    return path


@pytest.fixture(scope="module")
def alone(config: Path) -> torch.Tensor:
    """Weights from one process."""
    assert main(arguments(config, config.parent / "alone")) == 0
    return weights(config.parent / "alone")


def test_two_processes_learn_what_one_learns(config: Path, alone: torch.Tensor, tmp_path: Path) -> None:
    """The weights agree to rounding, and there is one model, exported once."""
    with two_processes(config, tmp_path / "run") as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert torch.allclose(weights(tmp_path / "run"), alone, atol=1e-4)
    assert (tmp_path / "run-models" / "tiny" / "1" / "manifest.json").exists()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "elbo" in line and line["step"] % 100 == 0] == [100, 200, 300, 400]
    assert sum("held_out_elbo" in line for line in lines) == 16


def test_stopped_half_way_they_leave_a_checkpoint_for_any_number(
    config: Path, alone: torch.Tensor, tmp_path: Path
) -> None:
    """SIGTERM stops all at the same step, and one process continues to the same weights."""
    run = tmp_path / "run"
    with two_processes(config, run) as process:
        deadline = time.monotonic() + 180.0
        while not (run / "log.jsonl").exists() or '"elbo"' not in (run / "log.jsonl").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=180)
    assert process.returncode != 0
    step = torch.load(run / "vae.pt", weights_only=True)["step"]
    assert 0 < step < 16 * (1294 // 50)
    assert main(arguments(config, run)) == 0
    assert torch.allclose(weights(run), alone, atol=1e-4)


def test_processes_that_cannot_share_a_minibatch_are_told_so(tmp_path: Path) -> None:
    """One microbatch for two processes is refused with the setting's name."""
    whole = tmp_path / "whole.toml"
    whole.write_text(TOML.replace("microbatches = 2\n", ""))
    with two_processes(whole, tmp_path / "run") as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    assert b"set microbatches in the TOML to a multiple of 2" in said
