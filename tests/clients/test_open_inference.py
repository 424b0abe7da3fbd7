"""Clients of the Open Inference Protocol, as they are, against a running service.

Each lives in an environment of its own below .bench/, with pinned packages. `make client-test` runs this.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.settings import Settings
from tests.clients.conftest import python_of
from tests.support.versions import conditional_version
from training.evaluation.served import started

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
MODELS = HERE.parents[1] / "models"
IMAGES = np.random.default_rng(0).random((2, 1, 28, 28), np.float32).round(3)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two shipped models and `photo`, a conditional one with variants for grey and colour, served."""
    models = tmp_path_factory.mktemp("models")
    for name in ("mnist", "mnist-2d"):
        (models / name).symlink_to(MODELS / name)
    conditional_version(models / "photo" / "1")
    settings = {"VAE_DEFAULT_MODEL": "mnist", "VAE_MODEL_CONTROL": "anonymous", "VAE_THREADS": "1"}
    with started(VAE_MODELS=str(models), **settings) as (_, url):
        yield url


@pytest.fixture(scope="module")
def expected(url: str) -> dict[str, Any]:
    """The same answers from `/v1`."""
    images = IMAGES.tolist()
    asked: dict[str, dict[str, Any]] = {
        "mnist/encode": {"images": images, "draws": 2, "seed": 7},
        "mnist/sample": {"count": 2, "seed": 7},
        "photo/denoise": {"images": images, "noise": "auto", "uncertainty": True, "seed": 3},
    }
    return {
        path.rpartition("/")[2]: httpx.post(f"{url}/v1/models/{path}", json=body, timeout=60).json()
        for path, body in asked.items()
    }


def answers_of(name: str, url: str) -> dict[str, Any]:
    """What the program of a client prints."""
    command = [python_of(f"client-{name}", name), HERE / name / "client.py", url]
    done = subprocess.run(
        command, input=json.dumps(IMAGES.tolist()), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_same(found: dict[str, Any], known: dict[str, Any]) -> None:
    for name, array in found.items():
        np.testing.assert_array_equal(np.array(array, np.float32), np.array(known[name], np.float32), name)


def test_tritons_client_works(url: str, expected: dict[str, Any]) -> None:
    """JSON and binary, compressed and not, blocking and not: the numbers of `/v1`; and all that is not inference."""
    answers = answers_of("triton", url)
    assert answers["up"] == [True, True, True]
    assert answers["server"]["name"] == "vae-service"
    assert answers["metadata"]["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 28, 28]}]
    assert answers["photo"]["inputs"][0]["shape"] == [-1, -1, -1, -1]
    assert answers["config"]["input"] == [{"name": "images", "data_type": "TYPE_FP32", "dims": [1, 28, 28]}]
    assert answers["config"]["max_batch_size"] == Settings().max_request_rows
    encoded = [answer for name, answer in answers.items() if name.startswith("encode ")] + answers["asynchronous"]
    assert len(encoded) == 22
    for answer in encoded:
        parameters = answer.pop("parameters")
        assert (parameters["seed"], parameters["fingerprint"]) == (7, expected["encode"]["fingerprint"])
        assert json.loads(parameters["notes"]) == expected["encode"]["notes"]
        assert_same(answer, expected["encode"])
    assert answers["sample"].pop("parameters")["seed"] == 7
    assert_same(answers["sample"], expected["sample"])
    assert answers["denoise"].pop("noise") == expected["denoise"]["noise"]
    assert_same(answers["denoise"], expected["denoise"])
    (counted,) = answers["statistics"]["model_stats"]
    assert counted["inference_count"] >= 2 * 18
    assert counted["inference_stats"]["success"]["count"] >= 18
    assert counted["inference_stats"]["compute_infer"]["ns"] > 0
    assert {"mnist.encode", "photo.inpaint"} < {*answers["all"]} < {one["name"] for one in answers["index"]}
    reason = "unloaded by request"
    entry = {"name": "mnist-2d", "version": "1", "state": "UNAVAILABLE", "reason": reason}
    assert answers["unloaded"] == [False, False, [entry]]
    assert answers["loaded"] is True
    says = {
        "unknown": ("404", "names here are MODEL.OPERATION"),
        "version": ("404", "no version"),
        "parameter": ("422", "drawz"),
        "output": ("422", "log_var"),
        "shape": ("422", "(n, 1, 28, 28)"),
        "config": ("400", "model repository"),
        "files": ("400", "model repository"),
        "deadline": ("504", "deadline"),
    }
    for name, (status, part) in says.items():
        assert answers["refused"][name], name
        assert answers["refused"][name][0] == f"{status}", answers["refused"][name]
        assert part in answers["refused"][name][1], answers["refused"][name]


def test_kserves_client_works(url: str, expected: dict[str, Any]) -> None:
    """JSON, binary and half precision; its own checks of health."""
    answers = answers_of("kserve", url)
    assert answers["up"] == [True, True, True, False]
    for binary in (True, False):
        answer = answers[f"encode {binary}"]
        assert answer.pop("id") == "mine"
        assert answer.pop("seed") == 7
        assert_same(answer, expected["encode"])
    assert answers["half"].keys() == {"mean"}
    np.testing.assert_allclose(answers["half"]["mean"], expected["encode"]["mean"], atol=5e-3)
    assert "422" in answers["refused"]
    assert "(n, 1, 28, 28)" in answers["refused"]


@pytest.mark.parametrize(
    ("model", "further"),
    [
        ("mnist.encode", []),
        ("mnist.decode", ["-b", "4"]),
        ("mnist.denoise", ["--input-tensor-format", "json", "--output-tensor-format", "json"]),
        ("photo.denoise", ["--shape", "images:3,24,32", "--shape", "mask:1,24,32"]),
    ],
)
def test_tritons_perf_analyzer_works(url: str, model: str, further: list[str], tmp_path: Path) -> None:
    """It reads metadata, configuration and statistics, sends requests, and reports a rate without an error."""
    report = tmp_path / "report.csv"
    command = [
        perf_analyzer(), "-m", model, "-u", url.removeprefix("http://"), "-i", "http", "--concurrency-range", "2",
        "--input-data", "zero",  # by default it sends random bits, among which are NaN
        "--request-count", "50",
        "-f", str(report), *further,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert report.exists(), done.stdout + done.stderr
    (row,) = csv.DictReader(report.read_text().splitlines())
    assert float(row["Inferences/Second"]) > 0, done.stdout


def perf_analyzer() -> str:
    """The program, from the path or from its wheel; the test is skipped where neither runs."""
    found = shutil.which("perf_analyzer")
    if found is None:
        packages = Path(python_of("client-perf", "perf")).parents[1] / "lib"
        found = str(next(packages.glob("*/site-packages/perf_analyzer/bin/perf_analyzer")))
        Path(found).chmod(0o755)
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"perf_analyzer does not run here: {done.stderr.strip().splitlines()[-1]}")
    return found
