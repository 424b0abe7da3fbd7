"""`map`: many images, a few at a time, resumable."""

from __future__ import annotations

import asyncio
import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from service.app import create_app
from service.settings import Settings
from tests.client.conftest import KINDS, Counted, answer, answering, ask, drop, environment
from tests.service.conftest import serving
from vae_client import AsyncClient, Client, Retries, errors
from vae_client.files import replacing, write

OPTIONS: dict[str, Any] = {"noise": "gaussian", "level": 0.25, "draws": 2, "seed": 5}


def images_in(place: Path) -> dict[str, np.ndarray]:
    """Pictures below a folder by name."""
    return {path.relative_to(place).as_posix(): np.asarray(Image.open(path)) for path in place.rglob("*.png")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_of_a_folder_has_its_result(kind: str, address: str, folder: Path, tmp_path: Path) -> None:
    """Under the same name, the same whichever client asked, in whatever order."""
    report = ask("async", address, lambda client: client.map("denoise", folder, tmp_path / kind, **OPTIONS))
    if kind == "sync":
        with Client(address) as client:
            report = client.map("denoise", folder, tmp_path / "again", concurrency=1, **OPTIONS)
        assert {n: a.tobytes() for n, a in images_in(tmp_path / "again").items()} == {
            n: a.tobytes() for n, a in images_in(tmp_path / kind).items()
        }
    found, given = images_in(tmp_path / kind), images_in(folder)
    assert found.keys() == given.keys()
    assert all(np.abs(found[name].astype(int) - given[name]).max() > 20 for name in found)
    assert (report.done, report.before, report.failed, report.seed, report.model) == (10, 0, (), 5, "mnist")


def test_a_map_works_in_a_notebook(address: str, folder: Path, tmp_path: Path) -> None:
    """Where an event loop runs already."""

    async def cell() -> int:
        with Client(address) as client:
            return client.map("score", folder, tmp_path / "scores.csv").done

    assert asyncio.run(cell()) == 10


def test_so_many_run_at_a_time_and_no_more(counted: tuple[Counted, str], folder: Path, tmp_path: Path) -> None:
    """Concurrency is bounded, and used."""
    app, url = counted
    with Client(url) as client:
        client.map("denoise", folder, tmp_path / "out", concurrency=3)
    assert (app.total, app.most) == (10, 3)


def test_what_is_done_is_not_done_again(counted: tuple[Counted, str], folder: Path, tmp_path: Path) -> None:
    """Only what is missing is asked for, and gets what it had before; other files of the folder are reported."""
    app, url = counted
    (folder / "notes.txt").write_text("x")
    out = tmp_path / "out"
    with Client(url) as client:
        first = client.map("denoise", folder, out, **OPTIONS)
        before = images_in(out)
        (out / "3.png").unlink()
        second = client.map("denoise", folder, out, **OPTIONS)
    assert (first.ignored, second.done, second.before, app.total) == (("notes.txt",), 1, 9, 11)
    after = images_in(out)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_killed_run_is_continued(counted: tuple[Counted, str], folder: Path, tmp_path: Path) -> None:
    """It leaves whole files alone, and the next run ends with what one run would have made."""
    _, url = counted
    out = tmp_path / "out"
    words = ["denoise", folder, "-o", out, "--concurrency", "1", "--level", "0.25", "--draws", "2", "--seed", "5"]
    command = [sys.executable, "-m", "vae_client", *map(str, words), "--noise", "gaussian"]
    process = subprocess.Popen(command, env=environment(VAE_CLIENT_URL=url))
    while len(images_in(out)) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = images_in(out)
    assert 3 <= len(done) < 10
    with Client(url) as client:
        report = client.map("denoise", folder, out, **OPTIONS)
        client.map("denoise", folder, tmp_path / "whole", **OPTIONS)
    assert (report.before, report.done) == (len(done), 10 - len(done))
    whole, found = images_in(tmp_path / "whole"), images_in(out)
    assert whole.keys() == found.keys()
    assert all(np.array_equal(whole[name], found[name]) for name in whole)
    assert [path.name for path in out.rglob(".*")] == []


def begun(path: Path) -> None:
    """Begin to write a file, and be interrupted."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(b"ne")
        raise KeyboardInterrupt


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """Until it is written its name has the old content, or none; an error changes nothing and leaves nothing."""
    path = tmp_path / "x.png"
    for before in (None, b"old"):
        with pytest.raises(KeyboardInterrupt):
            begun(path)
        with replacing(path) as unfinished:
            unfinished.write_bytes(b"new")
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == b"new"
        assert list(tmp_path.iterdir()) == [path]
        write(path, b"old")


def test_what_changed_is_done_again(
    counted: tuple[Counted, str], folder: Path, noisy: np.ndarray, tmp_path: Path
) -> None:
    """A file that is newer than its result, and other rows of an array: nothing stale is left."""
    app, url = counted
    with Client(url) as client:
        client.map("denoise", folder, tmp_path / "out", **OPTIONS)
        shutil.copy(folder / "1.png", folder / "0.png")
        assert client.map("denoise", folder, tmp_path / "out", **OPTIONS).done == 1
        one = client.map("score", noisy, tmp_path / "scores.npz", seed=1, rows=1)
        with pytest.raises(errors.OtherRun, match="other items"):
            client.map("score", noisy[::-1], tmp_path / "scores.npz", seed=1, rows=1)
    assert (one.done, app.total) == (3, 14)


def test_answers_that_no_picture_holds_are_arrays(client: Client, folder: Path, tmp_path: Path) -> None:
    """A file of arrays for each picture, and a heat map as a picture; what is asked for in vain ends the run."""
    client.map("denoise", folder, tmp_path / "std", uncertainty=True)
    with np.load(tmp_path / "std" / "0.npz") as file:
        assert {"images", "std", "fingerprint"} <= {*file}
    assert client.map("denoise", folder, tmp_path / "heat", uncertainty="map").done == 10
    assert len(images_in(tmp_path / "heat")) == 10
    with pytest.raises(errors.NotAcceptable):
        client.map("denoise", folder, tmp_path / "no", uncertainty=True, accept="png")


def test_bad_files_are_listed_at_the_end(client: Client, folder: Path, tmp_path: Path) -> None:
    """All others are done; a mended one is done by the next run."""
    good = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(b"no picture")
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:100])
    report = client.map("denoise", folder, tmp_path / "out")
    assert [(one.name, type(one.error)) for one in report.failed] == [
        ("2.png", errors.Unreadable),
        ("7.png", errors.Unreadable),
    ]
    assert report.done == 8
    (folder / "2.png").write_bytes(good)
    report = client.map("denoise", folder, tmp_path / "out")
    assert ([one.name for one in report.failed], report.done, report.before) == (["7.png"], 1, 8)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (errors.InvalidOption, {"level": 7.0}),
        (errors.UnknownModel, {"model": "nobody"}),
        (errors.UnsupportedOperation, {"model": "mnist-2d"}),
        (errors.InvalidRequest, {"levle": 0.2}),
        (errors.InvalidRequest, {"concurrency": 0}),
        (errors.InvalidRequest, {"version": "3"}),
    ],
)
def test_what_no_item_can_do_ends_the_run(
    counted: tuple[Counted, str], folder: Path, tmp_path: Path, error: type[Exception], options: dict[str, Any]
) -> None:
    """At once, as the exception that it is, not once an item."""
    app, url = counted
    with Client(url) as client, pytest.raises(error):
        client.map("denoise", folder, tmp_path / "out", **{"concurrency": 2, **options})
    assert app.total <= 2


def test_a_service_that_goes_away_ends_the_run(client: Client, folder: Path, tmp_path: Path) -> None:
    """As an error of the connection; what is done stays."""
    told = [json.dumps(one).encode() for one in (client.models(), client.model("mnist"))]
    picture = answer(200, client.denoise(folder / "0.png", accept="png").content, "image/png", x_model="mnist")
    behaviours = [*(answer(200, content) for content in told), picture, picture, drop]
    retries = Retries(first_s=0.01)
    with (
        answering(behaviours) as server,
        Client(server.url, retries=retries) as lost,
        pytest.raises(errors.Unreachable),
    ):
        lost.map("denoise", folder, tmp_path / "out", concurrency=1)
    assert len(images_in(tmp_path / "out")) == 2


def test_results_of_different_runs_are_not_mixed(client: Client, folder: Path, tmp_path: Path) -> None:
    """Other options, another model or another seed: the message names the difference. Defaults are no difference."""
    out = tmp_path / "out"
    client.map("denoise", folder, out, seed=5)
    for options, says in (({"level": 0.3}, "options"), ({"seed": 6}, "seed"), ({"mask": np.ones((28, 28))}, "mask")):
        with pytest.raises(errors.OtherRun, match=says):
            client.map("denoise", folder, out, **{"seed": 5, **options})
    with pytest.raises(errors.OtherRun, match="operation"):
        client.map("reconstruct", folder, out)
    assert client.map("denoise", folder, out, quality="fast").before == 10
    record = json.loads((out / "vae-run.json").read_text())
    assert (record["seed"], record["fingerprint"]) == (5, client.model("mnist")["fingerprint"])


def test_the_model_stays_that_of_the_run(
    folder: Path, tmp_path: Path, flat_models: Path, brighter: Callable[..., Path]
) -> None:
    """A version that is loaded between two runs is refused by name, and one that is named goes on."""
    app = create_app(Settings(models=flat_models, threads=1, model_control="anonymous"))
    with serving(app) as url, Client(url) as client:
        client.map("encode", folder, tmp_path / "out", seed=5)
        (tmp_path / "out" / "3.npz").unlink()
        brighter(flat_models, "2")
        client.load("mnist-2d")
        with pytest.raises(errors.OtherRun, match="version"):
            client.map("encode", folder, tmp_path / "out", seed=5)
        assert client.map("encode", folder, tmp_path / "out", seed=5, model="mnist-2d", version="1").done == 1


def columns_of(path: Path) -> dict[str, Any]:
    """The columns of a table."""
    if path.suffix == ".parquet":
        table = parquet.read_table(path)
        return {name: np.array(table[name].to_pylist()) for name in table.column_names}
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_a_table_has_a_row_an_image(client: Client, folder: Path, tmp_path: Path, suffix: str) -> None:
    """In the order of the names, with what the service answers for each, its seed and the model."""
    out = tmp_path / f"latents{suffix}"
    client.map("encode", folder, out, draws=2, seed=5)
    table = columns_of(out)
    assert list(table["path"]) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    one = client.encode(folder / "4.png", draws=2, seed=int(table["seed"][4]))
    np.testing.assert_array_equal(table["mean"][4].astype(np.float32), one.mean[0])
    np.testing.assert_array_equal(table["latents"][4].astype(np.float32).reshape(2, 40), one.latents[0])
    assert len(set(table["seed"])) == 10
    if suffix == ".parquet":
        schema = parquet.read_schema(out)
        assert schema.metadata[b"fingerprint"].decode() == one.fingerprint
        assert json.loads(schema.field("latents").metadata[b"shape"]) == [2, 40]
    else:
        assert str(table["fingerprint"]) == one.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, f"{out.name}.vae-run.json", "pictures"]


def test_scores_are_a_table_of_text(client: Client, folder: Path, tmp_path: Path) -> None:
    """As programs of tables read it; arrays do not go into one."""
    client.map("score", folder, tmp_path / "scores.csv", seed=5)
    table = columns_of(tmp_path / "scores.csv")
    assert {"path", "elbo", "kl", "percentile", "seed"} <= table.keys()
    elbo = client.score(folder / "0.png", seed=int(table["seed"][0])).elbo[0]
    assert float(table["elbo"][0]) == pytest.approx(elbo)
    with pytest.raises(errors.InvalidRequest, match=r"\.npz or \.parquet"):
        client.map("encode", folder, tmp_path / "latents.csv")


def test_a_table_that_is_whole_is_left_alone(counted: tuple[Counted, str], folder: Path, tmp_path: Path) -> None:
    """While its images are the same; otherwise the message says so. One with failures is completed."""
    app, url = counted
    out = tmp_path / "latents.parquet"
    good = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(b"no picture")
    with Client(url) as client:
        assert [one.name for one in client.map("encode", folder, out).failed] == ["2.png"]
        assert len(columns_of(out)["path"]) == 9
        (folder / "2.png").write_bytes(good)
        assert client.map("encode", folder, out).done == 1
        assert len(columns_of(out)["path"]) == 10
        total = app.total
        assert client.map("encode", folder, out).before == 10
        assert app.total == total
        (folder / "new.png").write_bytes(good)
        with pytest.raises(errors.OtherRun, match="other items"):
            client.map("encode", folder, out)


def test_rows_of_an_array_are_done_in_parts(counted: tuple[Counted, str], noisy: np.ndarray, tmp_path: Path) -> None:
    """The result has a row for each, and is that of the single rows."""
    app, url = counted
    many = np.concatenate([np.roll(noisy, k, -1) for k in range(10)])
    with Client(url) as client:
        report = client.map("denoise", many, tmp_path / "clean.npy", level=0.25, noise="gaussian", rows=7)
        assert (report.done, app.total) == (5, 5)
        found = np.load(tmp_path / "clean.npy")
        np.testing.assert_allclose(
            found[13], client.denoise(many[13], level=0.25, noise="gaussian").images[0], atol=1e-5
        )
        client.map("denoise", many, tmp_path / "clean.npz", uncertainty=True)
        table = columns_of(tmp_path / "clean.npz")
    assert found.shape == many.shape
    assert table["std"].shape == table["images"].shape == many.shape
    assert table["level"].shape == (30,)
    np.testing.assert_array_equal(table["row"], np.arange(30))


def test_latents_are_decoded_in_parts(client: Client, noisy: np.ndarray, tmp_path: Path) -> None:
    """As images are encoded."""
    posterior = client.encode(noisy)
    client.map("decode", posterior.mean, tmp_path / "images.npy", rows=1)
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), client.decode(posterior).images, atol=1e-6)


@pytest.mark.parametrize(
    ("operation", "source", "out", "says"),
    [
        ("sample", "pictures", "out", "map runs"),
        ("denoise", "pictures", "pictures", "holds the images themselves"),
        ("denoise", "nowhere", "out", "is no folder"),
        ("denoise", "empty", "out", "holds none of the files that this reads: .avif"),
        ("denoise", "twins", "out", "would both become"),
        ("denoise", np.zeros((3, 28, 28)), "out", "one file"),
        ("denoise", np.zeros((0, 28, 28)), "out.npz", "has 0 rows"),
        ("denoise", [], "out", "list of files is empty"),
    ],
)
def test_what_is_no_run_is_refused(
    client: Client, folder: Path, tmp_path: Path, operation: str, source: Any, out: str, says: str
) -> None:
    """Before anything is computed, and without a trace."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "twins").mkdir()
    for name in ("a.png", "a.jpg"):
        (tmp_path / "twins" / name).write_bytes((folder / "0.png").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(errors.InvalidRequest, match=says):
        client.map(operation, tmp_path / source if isinstance(source, str) else source, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_results_may_stand_in_the_folder_itself(client: Client, folder: Path) -> None:
    """In a folder of their own, which the next run does not take for pictures."""
    assert client.map("denoise", folder, folder / "clean").done == 10
    assert client.map("denoise", folder, folder / "clean").before == 10
    assert client.map("encode", folder, folder / "latents.npz").done == 20
    with pytest.raises(errors.OtherRun):
        client.map("encode", folder / "more", folder / "latents.npz")


def test_cancelling_leaves_no_request_behind(counted: tuple[Counted, str], folder: Path, tmp_path: Path) -> None:
    """Tasks end with the run."""
    app, url = counted

    async def run() -> int:
        async with AsyncClient(url) as client:
            task = asyncio.ensure_future(client.map("denoise", folder, tmp_path / "out", concurrency=2))
            while app.total < 4:  # noqa: ASYNC110  # another thread counts
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return len(asyncio.all_tasks()) - 1

    assert asyncio.run(run()) == 0
    assert app.total < 10
