"""Runs in processes, as users start them: the same bytes for any number of them, and whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from service.bulk import processes
from service.bulk.command import main
from service.bulk.source import Task
from service.errors import StartError
from tests.bulk.conftest import MODELS, Levels, bulk

ROWS, PART = 4000, 64
COMMAND = [sys.executable, "-m", "service.bulk", "encode"]
ASKED = ["--models", str(MODELS), "--model", "mnist-2d", "--draws", "4", "--seed", "9", "--rows", str(PART)]


@pytest.fixture(scope="module")
def source(levels: Levels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of many rows in one row group."""
    path = tmp_path_factory.mktemp("source") / "images.parquet"
    numbers = pa.array(np.resize(levels, (ROWS, 784)).ravel())
    parquet.write_table(pa.table({"image": pa.FixedSizeListArray.from_arrays(numbers, 784)}), path)
    return path


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run in this process writes."""
    return parts(finished(source, tmp_path_factory.mktemp("whole"), ROWS))


def started(source: Path, out: Path, workers: int = 2) -> subprocess.Popen[str]:
    """The command, in a process group of its own."""
    command = [*COMMAND, str(source), str(out), *ASKED, "--json", "--workers", str(workers)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=MODELS.parent
    )


def finished(source: Path, out: Path, left: int) -> Path:
    """Do the rest of a run in this process; so many rows are left."""
    report = bulk("encode", source, out, options={"draws": 4, "seed": 9}, rows=PART)
    assert (report.done, report.before) == (left, ROWS - left)
    return out


def parts(out: Path) -> dict[str, bytes]:
    """The results and their records, by name."""
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.suffix in (".parquet", ".json")
    }


def children(of: int) -> list[int]:
    """The processes of a run that compute."""
    found = Path(f"/proc/{of}/task/{of}/children").read_text().split()
    return [int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for(true: Callable[[], object]) -> None:
    """Wait for a few minutes at most: other tests may have the cores."""
    end = time.monotonic() + 200.0
    while not true():
        assert time.monotonic() < end
        time.sleep(0.03)


def done(out: Path) -> list[Path]:
    """The parts that are done."""
    return list((out / "_vae-bulk" / "parts").glob("*.json"))


def test_any_number_of_processes(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Two, of which one is killed, write the same bytes as one."""
    out = tmp_path / "killed"
    with started(source, out) as run:
        wait_for(lambda: len(done(out)) > 5)
        os.kill(children(run.pid)[0], signal.SIGKILL)
        said, problem = run.communicate(timeout=300)
    assert run.returncode == 0, problem
    report = json.loads(said)
    assert report["done"] + report["before"] == ROWS  # its last part may have been whole
    assert parts(out) == whole


def test_processes_have_runs_of_parts() -> None:
    """Long ones first, whose row groups one process decodes; short ones at the end, when others wait."""
    tasks = [Task(f"{k:08d}", ("x.parquet",), k) for k in range(40)]
    found = list(processes.runs(tasks, 2))
    assert list(chain(*found)) == tasks
    assert [len(run) for run in found] == [10, 7, 5, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    assert list(processes.runs(tasks[:2], 3)) == [[tasks[0]], [tasks[1]]]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_run_goes_on(source: Path, whole: dict[str, bytes], tmp_path: Path, by: signal.Signals) -> None:
    """After kill -9 and after Ctrl-C: no process stays, and what was written is not written again."""
    out = tmp_path / "out"
    with started(source, out, 2 if by == signal.SIGKILL else 1) as run:
        wait_for(lambda: len(done(out)) > 5)
        pids = children(run.pid)
        if by == signal.SIGINT:
            os.killpg(run.pid, by)  # as a terminal does
        else:
            os.kill(run.pid, by)
        _, problem = run.communicate(timeout=60)
    assert run.returncode == (-9 if by == signal.SIGKILL else 130)
    assert by == signal.SIGKILL or problem.endswith("stopped; the same command goes on from here\n")
    assert "Traceback" not in problem
    wait_for(lambda: not any(alive(pid) for pid in pids))
    before = {path: path.stat().st_mtime_ns for path in done(out)}
    assert len(before) < ROWS // PART
    left = ROWS - sum(min(PART, ROWS - PART * int(path.stem)) for path in before)
    assert parts(finished(source, out, left)) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_ends_every_process_ends_the_run(source: Path, tmp_path: Path) -> None:
    """After a few tries, with the part and the signal in the message; nothing stays behind."""
    out = tmp_path / "out"
    with started(source, out, 1) as run:
        while run.poll() is None:
            for pid in children(run.pid) if alive(run.pid) else ():
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        _, problem = run.communicate()
    assert run.returncode == 1
    assert problem.startswith(f"vae-bulk: part 00000000 (images.parquet, from row 0) has ended {processes.MOST_DEATHS}")
    assert "by SIGKILL" in problem


def test_an_error_in_a_process_is_that_of_the_run(folder: Path, tmp_path: Path) -> None:
    """Here a full target: it is no matter of one image."""
    out = tmp_path / "out"

    def spoilt(*given: object) -> Iterator[object]:
        (out / "part-00000000.parquet").mkdir()  # where the file is to be
        return processes.run(*given)  # type: ignore[arg-type]

    with pytest.raises(OSError, match=r"part-00000000.parquet"):
        bulk("encode", folder, out, pool=spoilt, workers=1)
    assert not done(out)


def test_the_command_tells_what_failed(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By its exit status, and by a line that names the table; a refusal is one line."""
    (folder / "0" / "001.png").write_bytes(b"no picture")
    command = ["encode", str(folder), str(tmp_path / "out"), "--models", str(MODELS), "--model", "mnist-2d"]
    assert main([*command, "--workers", "1"]) == 3
    assert f"1 rows have no results; {tmp_path / 'out'}/_vae-bulk/errors.parquet says why" in capfd.readouterr().out
    assert main([*command, "--version", "7"]) == 1
    assert capfd.readouterr() == ("", 'vae-bulk: model mnist-2d has no version "7"; its folder holds 1\n')


def test_without_ray_the_extra_is_named() -> None:
    """Where Ray is not installed."""
    with pytest.raises(StartError, match=r"install the extra: pip install '.\[ray\]'"):
        from service.bulk import cluster  # noqa: F401, PLC0415
