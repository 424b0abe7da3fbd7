"""Bulk runs on a real Ray of this machine: the bytes of processes without Ray, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
ROWS, PART = 20_000, 64
LIMIT_S = 300


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of images of random blocks, in one row group."""
    blocks = np.random.default_rng(4).integers(0, 256, (ROWS, 7, 7), np.uint8)
    images = blocks.repeat(4, 1).repeat(4, 2).reshape(ROWS, 784)
    path = tmp_path_factory.mktemp("source") / "images.parquet"
    lists = pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), 784)
    parquet.write_table(pa.table({"image": lists}), path)
    return path


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What processes without Ray write, in the environment of the tests."""
    out = tmp_path_factory.mktemp("whole")
    with started(sys.executable, dict(os.environ), source, out) as run:
        counted(run, 0)
    return parts(out)


def counted(run: subprocess.Popen[str], before: int) -> None:
    """Wait for the end of a run. Its report, which alone is on standard output, has all rows, some as done before."""
    said, problem = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 0, problem
    report = json.loads(said)
    assert report["done"] + report["before"] == ROWS
    assert report["before"] == before


def started(python: str, environment: dict[str, str], source: Path, out: Path, *further: str) -> subprocess.Popen[str]:
    """A run of two processes, or with `--ray` of two actors."""
    command = [python, "-m", "service.bulk", "encode", str(source), str(out), "--models", str(ROOT / "models")]
    command += ["--model", "mnist-2d", "--draws", "4", "--seed", "9", "--rows", str(PART), "--workers", "2", "--json"]
    return subprocess.Popen(
        [*command, *further], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )


def parts(out: Path) -> dict[str, bytes]:
    """The results, by name."""
    return {path.name: path.read_bytes() for path in out.rglob("part-*.parquet")}


def actors(run: subprocess.Popen[str]) -> list[int]:
    """The actors of a run: Ray names their processes after what they do, and they descend from the run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            mine = b"MapWorker" in (path / "cmdline").read_bytes() and run.pid in ancestors(path)
        except OSError:  # it has just ended
            continue
        found += [int(path.name)] * mine
    return found


def ancestors(path: Path) -> list[int]:
    """The parent of a process, its parent, and so on."""
    found = []
    while (pid := int((path / "stat").read_text().rpartition(")")[2].split()[1])) > 0:
        found.append(pid)
        path = path.with_name(str(pid))
    return found


def wait_for_parts(run: subprocess.Popen[str], out: Path, count: int) -> None:
    """Wait until some parts are done."""
    end = time.monotonic() + LIMIT_S
    while len(list(out.glob("_vae-bulk/parts/*.json"))) < count:
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


def test_actors_write_what_processes_write(
    ray_python: str, ray_environment: dict[str, str], source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """To the byte; and an actor that is killed on the way loses nothing."""
    out = tmp_path / "out"
    with started(ray_python, ray_environment, source, out, "--ray", "local") as run:
        wait_for_parts(run, out, 5)
        pids = actors(run)
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        said, problem = run.communicate(timeout=LIMIT_S)  # Ray tells of the actor in the second one
    assert run.returncode == 0, problem
    report = json.loads(said)
    assert report["done"] + report["before"] == ROWS  # what the actor had done of its run of parts is not done again
    assert parts(out) == whole


def test_a_run_on_ray_goes_on_without_it(
    ray_python: str, ray_environment: dict[str, str], source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """After kill -9 of the process that began it; what the actors have written is not done again."""
    out = tmp_path / "out"
    with started(ray_python, ray_environment, source, out, "--ray", "local") as run:
        wait_for_parts(run, out, 5)
        run.kill()
        run.communicate(timeout=60)
    before = 0
    while before != (before := len(list(out.glob("_vae-bulk/parts/*.json")))):
        time.sleep(5)  # Ray ends its actors a moment later
    assert before < ROWS // PART
    with started(sys.executable, dict(os.environ), source, out) as run:
        counted(run, before * PART)
    assert parts(out) == whole


def test_a_cluster_that_is_not_there(
    ray_python: str, ray_environment: dict[str, str], source: Path, tmp_path: Path
) -> None:
    """One line, with the fix."""
    with started(ray_python, ray_environment, source, tmp_path / "out", "--ray", "127.0.0.1:1") as run:
        _, problem = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 1
    assert "vae-bulk: no Ray cluster at 127.0.0.1:1" in problem
    assert "--ray local" in problem
