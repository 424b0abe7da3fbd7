"""Runs in one process: what is computed, what is written, what is not done again, and what fails."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import dataset, parquet

from service.bulk.files import DRAFTS, Folder
from service.bulk.operator import Outcome
from service.bulk.run import Request, planned, run
from service.bulk.target import begin
from service.errors import ServiceError, StartError
from service.operations.operation import Inputs
from service.operations.registry import OPERATIONS
from service.repository.repository import Repository
from service.repository.selection import Selection
from service.runtime.model import Model
from service.runtime.scheduler import Engine
from service.settings import Settings
from tests.bulk.conftest import MODELS, Levels, bulk, here, png

ERRORS = "_vae-bulk/errors.parquet"


@pytest.fixture(scope="module")
def model() -> Model:
    """The model of the runs, opened as the service does."""
    return Repository.open(MODELS, "mnist-2d", "CPUExecutionProvider", 1, 64, Selection("mnist-2d:1")).find(
        "mnist-2d", None
    )


@pytest.fixture(scope="module")
def mnist() -> Model:
    """A model that scores."""
    return Repository.open(MODELS, "mnist", "CPUExecutionProvider", 1, 64, Selection("mnist:latest")).find(
        "mnist", None
    )


def answer(model: Model, operation: str, images: Levels, **options: Any) -> dict[str, Any]:
    """The outputs of the service for one request of all images."""
    found = next(one for one in OPERATIONS if one.name == operation)
    engine = Engine(max_rows=64, queue_rows=sys.maxsize)
    rows = np.divide(images[:, None], np.float32(255.0), dtype=np.float32)

    async def asked() -> dict[str, Any]:
        result = await found.perform(model, engine.submit, Inputs(rows), found.options(**options))
        await engine.close()
        return result.outputs

    return asyncio.run(asked())


def lists(images: Levels, length: int = 784) -> pa.Table:
    """A table of flat images."""
    return pa.table({"image": pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), length)})


def table_of(target: Path) -> pa.Table:
    """What a run has written, as any reader of Parquet data sets finds it."""
    return dataset.dataset(target).to_table()


def column(table: pa.Table, name: str) -> Any:
    """A column of lists in the shape that its metadata says."""
    shape = json.loads(table.schema.field(name).metadata[b"shape"])
    return table.column(name).combine_chunks().flatten().to_numpy().reshape(-1, *shape)


def contents(target: Path) -> dict[str, bytes]:
    """Every file of the results."""
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def errors(target: Path) -> list[dict[str, Any]]:
    """The table of the rows without results."""
    return parquet.read_table(target / ERRORS).to_pylist()


def test_a_run_is_one_request_of_all_rows(
    written: Callable[..., Path], levels: Levels, model: Model, tmp_path: Path
) -> None:
    """Draws too, to the bit, whatever the size of the parts."""
    source = written(lists(levels), row_group_size=90)
    expected = answer(model, "encode", levels, draws=3, seed=7)
    for rows in (200, 64, 33):
        report = bulk("encode", source, tmp_path / f"of-{rows}", options={"draws": 3, "seed": 7}, rows=rows)
        assert (report.done, report.before, report.failed, report.seed) == (200, 0, [], 7)
        found = table_of(tmp_path / f"of-{rows}")
        assert found.column("row").to_pylist() == list(range(200))
        assert set(found.column("path").to_pylist()) == {"images.parquet"}
        for name, known in expected.items():
            assert np.array_equal(column(found, name), known), name
        about = {key.decode(): value.decode() for key, value in found.schema.metadata.items()}
        assert about["fingerprint"] == model.manifest.fingerprint
        assert (about["model"], about["version"], about["operation"]) == ("mnist-2d", "1", "encode")
        assert json.loads(about["options"]) == {"draws": 3, "seed": 7}
        assert not errors(tmp_path / f"of-{rows}")


def test_scores_are_columns(written: Callable[..., Path], levels: Levels, mnist: Model, tmp_path: Path) -> None:
    """Binarised by draws of the seed, as a request is."""
    options = {"draws": 2, "seed": 3, "binarise": "sample"}
    bulk("score", written(lists(levels[:70])), tmp_path / "out", model="mnist", options=options, rows=64)
    found = table_of(tmp_path / "out")
    for name, known in answer(mnist, "score", levels[:70], **options).items():
        assert np.array_equal(found.column(name).to_numpy(), known), name


def test_pictures_become_pictures(folder: Path, levels: Levels, model: Model, tmp_path: Path) -> None:
    """Of the same names, in the same folders; or a table of images where one is asked for."""
    report = bulk("reconstruct", folder, tmp_path / "out")
    assert report.done == 70
    expected = answer(model, "reconstruct", levels[:70])["images"]
    for k in (0, 39, 40, 69):
        with Image.open(tmp_path / "out" / f"{k // 40}" / f"{k:03d}.png") as image:
            assert np.array_equal(np.asarray(image), np.rint(expected[k, 0] * 255))
    bulk("reconstruct", folder, tmp_path / "table", form="parquet")
    found = table_of(tmp_path / "table")
    assert np.array_equal(column(found, "images"), expected)
    assert found.column("path").to_pylist() == [f"{k // 40}/{k:03d}.png" for k in range(70)]


def test_16_bits_stay(tmp_path: Path, levels: Levels) -> None:
    """A TIFF of 16 bits becomes one, and a PNG of 16 bits too."""
    home = tmp_path / "deep"
    home.mkdir()
    for name in ("a.tif", "b.png"):
        Image.fromarray(levels[0].astype(np.uint16) * 257).save(home / name)
    bulk("reconstruct", home, tmp_path / "out")
    for name in ("a.tif", "b.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.mode == "I;16"


def test_noise_levels_are_columns(written: Callable[..., Path], levels: Levels, tmp_path: Path) -> None:
    """What the service says of each image stands beside its answer."""
    bulk("denoise", written(lists(levels[:70])), tmp_path / "out", model="mnist", options={"uncertainty": "true"})
    found = table_of(tmp_path / "out")
    assert len(column(found, "std")) == len(column(found, "images")) == 70
    assert (found.column("level").to_numpy() > 0).all()


def test_images_of_several_sizes(tmp_path: Path, levels: Levels) -> None:
    """A model of free size: each list is as long as its image, and a column says its shape."""
    home = tmp_path / "sizes"
    home.mkdir()
    for k, (height, width) in enumerate([(28, 28), (28, 28), (20, 24)]):
        Image.fromarray(levels[k][:height, :width]).save(home / f"{k}.png")
    bulk("denoise", home, tmp_path / "out", model="photo", form="parquet")
    found = table_of(tmp_path / "out")
    shapes = found.column("images_shape").to_pylist()
    assert shapes == [[1, 28, 28], [1, 28, 28], [1, 20, 24]]
    assert [len(one) for one in found.column("images").to_pylist()] == [784, 784, 480]


def test_bad_images_do_not_end_a_run(folder: Path, levels: Levels, model: Model, tmp_path: Path) -> None:
    """They are rows of the errors table, and the draws of all others are as if nothing were wrong."""
    (folder / "0" / "003.png").write_bytes(b"no picture")
    (folder / "1" / "050.png").write_bytes(png(levels[50])[:-30])
    (folder / "1" / "051.png").write_bytes(png(levels[51][:20]))
    (folder / "1" / "060.png").unlink()
    (folder / "1" / "060.png").symlink_to("nowhere.png")
    (folder / "notes.txt").write_text("of the photographer")
    report = bulk("encode", folder, tmp_path / "out", options={"draws": 1, "seed": 5})
    assert (report.done, len(report.failed), report.ignored) == (66, 4, 1)
    found = {one["path"]: (one["row"], one["code"]) for one in errors(tmp_path / "out")}
    assert found == {
        "0/003.png": (3, "unreadable_body"),
        "1/050.png": (50, "unreadable_body"),
        "1/051.png": (51, "invalid_shape"),
        "1/060.png": (60, "unreadable_body"),
    }
    rows = table_of(tmp_path / "out")
    kept = rows.column("row").to_numpy()
    assert np.array_equal(
        column(rows, "latents"), answer(model, "encode", levels[:70], draws=1, seed=5)["latents"][kept]
    )


def test_bad_rows_of_a_table(written: Callable[..., Path], levels: Levels, model: Model, tmp_path: Path) -> None:
    """Missing, not finite, too bright or of another length; each is told by itself."""
    rows: list[Any] = [(one / np.float32(255)).ravel().tolist() for one in levels[:40]]
    rows[4], rows[9][7], rows[20][3] = None, float("nan"), 2.0
    bulk("encode", written(pa.table({"image": pa.array(rows, pa.list_(pa.float32()))})), tmp_path / "out")
    assert [(one["row"], one["code"]) for one in errors(tmp_path / "out")] == [
        (4, "invalid_value"), (9, "invalid_value"), (20, "invalid_value")
    ]  # fmt: skip
    found = table_of(tmp_path / "out")
    expected = answer(model, "encode", levels[:40])["mean"]
    assert np.array_equal(column(found, "mean"), expected[found.column("row").to_numpy()])


def test_nothing_is_done_twice(folder: Path, levels: Levels, tmp_path: Path) -> None:
    """A part is computed again if its pictures or its results hold something else, whatever their times say."""
    out = tmp_path / "out"
    first = bulk("encode", folder, out, options={"draws": 1}, rows=20)
    before = contents(out)
    again = bulk("encode", folder, out, options={"draws": 1}, rows=20)
    assert (again.done, again.before, again.seed) == (0, 70, first.seed)
    assert contents(out) == before
    state = (folder / "0" / "025.png").stat()
    (folder / "0" / "025.png").write_bytes(png(levels[25][::-1].copy()).ljust(state.st_size, b"\0")[: state.st_size])
    os.utime(folder / "0" / "025.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    part = out / "part-00000003.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    mended = bulk("encode", folder, out, options={"draws": 1}, rows=20)
    assert (mended.done + len(mended.failed), mended.before) == (30, 40)
    after = contents(out)
    changed = {name for name in before if after[name] != before[name] and name.startswith("part")}
    assert changed == {"part-00000001.parquet"}


def test_more_images_later(folder: Path, levels: Levels, tmp_path: Path) -> None:
    """The parts before the new ones stay; fewer images than before are refused."""
    out = tmp_path / "out"
    bulk("encode", folder, out, rows=20)
    (folder / "2").mkdir()
    (folder / "2" / "new.png").write_bytes(png(levels[99]))
    report = bulk("encode", folder, out, rows=20)
    assert (report.done, report.before) == (11, 60)
    (folder / "2" / "new.png").unlink()
    with pytest.raises(StartError, match="of 71 rows, and the source now has 70"):
        bulk("encode", folder, out, rows=20)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"options": {"draws": 2}}, "whose options is"),
        ({"options": {"draws": 1, "seed": 4}}, "whose seed is 3"),
        ({"model": "mnist"}, "whose model is mnist-2d"),
        ({"rows": 64}, "whose rows is 1024"),
    ],
)
def test_results_are_of_one_run(folder: Path, tmp_path: Path, other: dict[str, Any], message: str) -> None:
    """Another model, seed, or other options need another place."""
    asked: dict[str, Any] = {"options": {"draws": 1, "seed": 3}}
    bulk("encode", folder, tmp_path / "out", **asked)
    with pytest.raises(StartError, match=message):
        bulk("encode", folder, tmp_path / "out", **{**asked, **other})


def test_what_cannot_work_is_refused_before_anything_is_written(
    folder: Path, written: Callable[..., Path], levels: Levels, tmp_path: Path
) -> None:
    """Each with the fix."""
    out = tmp_path / "out"
    binary = (levels > 127).astype(np.uint8)
    two = pa.table({"a": lists(levels).column(0), "b": lists(levels).column(0)})
    wrong: list[tuple[str, Any, dict[str, Any], str]] = [
        ("sample", folder, {}, "a bulk run does encode"),
        ("encode", tmp_path / "nowhere", {}, "nothing is at"),
        ("encode", folder, {"model": "none"}, "no model"),
        ("encode", folder, {"version": "9"}, "no version"),
        ("encode", folder, {"options": {"draw": 1}}, "options of encode"),
        ("encode", folder, {"options": {"level": "0.1"}}, "leave noise and level out"),
        ("denoise", folder, {"options": {"uncertainty": "map"}, "model": "mnist"}, "use uncertainty=true"),
        ("score", folder, {}, "cannot score"),
        ("encode", written(lists(binary)), {}, "store black and white as bool"),
        ("encode", written(two, "two.parquet"), {}, "name one with --column"),
        ("encode", written(two, "two.parquet"), {"column": "c"}, "has no column c"),
        ("encode", written(lists(levels[:, :14], 392), "short.parquet"), {}, "none of the first 200 images"),
    ]
    for operation, source, further, message in wrong:
        with pytest.raises(ServiceError, match=message):
            bulk(operation, source, out, **further)
    assert not out.exists()


def test_a_folder_of_others_is_left_alone(folder: Path, tmp_path: Path) -> None:
    """Results never go among other files, nor two pictures into one file."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("x")
    with pytest.raises(StartError, match="holds no models; name the model repository with --models"):
        run(Settings(models=folder / "0"), Request("encode", str(folder), str(tmp_path / "none")), progress=False)
    with pytest.raises(StartError, match="holds other files"):
        bulk("encode", folder, tmp_path / "out")
    (folder / "0" / "001.bmp").write_bytes((folder / "0" / "001.png").read_bytes())
    with pytest.raises(StartError, match=r"0/001.bmp and 0/001.png would both become 0/001.png"):
        bulk("reconstruct", folder, tmp_path / "others")


def test_results_of_what_has_become_bad_go(folder: Path, tmp_path: Path) -> None:
    """A picture that can be read no more has none, and a part without any good row no table."""
    pictures, table = tmp_path / "restored", tmp_path / "table"
    for form, out in (("images", pictures), ("parquet", table)):
        bulk("reconstruct", folder, out, form=form, rows=20)
    for k in range(20, 40):
        (folder / "0" / f"{k:03d}.png").write_bytes(b"no picture")
    for form, out in (("images", pictures), ("parquet", table)):
        report = bulk("reconstruct", folder, out, form=form, rows=20)
        assert (report.before, len(report.failed)) == (50, 20)
    assert sorted(path.stem for path in pictures.rglob("*.png")) == [f"{k:03d}" for k in (*range(20), *range(40, 70))]
    assert table_of(table).column("row").to_pylist() == [*range(20), *range(40, 70)]


def test_one_run_at_a_time(folder: Path, tmp_path: Path) -> None:
    """Another one would choose another seed. What a killed one was writing is removed, and is nobody's file."""
    out, draft = Folder(str(tmp_path / "out")), tmp_path / "out" / DRAFTS / "0"
    with out.locked():
        draft.parent.mkdir()
        draft.write_bytes(b"of a process that was killed")
        with pytest.raises(StartError, match=r"another run writes to .*out; wait for its end"):
            bulk("encode", folder, tmp_path / "out", options={"draws": 1})
    assert not draft.exists()
    draft.parent.mkdir()
    draft.write_bytes(b"PAR1")
    assert bulk("encode", folder, tmp_path / "out", options={"draws": 1}).done == 70
    assert not draft.exists()


def test_the_time_of_computing(folder: Path, tmp_path: Path) -> None:
    """It begins with the first part, though Ray tells of several at once, and ends with the last, before Ray does."""

    def as_ray(*given: Any) -> Iterator[Outcome]:
        began = time.monotonic()
        first, *others = here(*given)
        time.sleep(0.2)
        yield first._replace(since_s=time.monotonic() - began)
        yield from others
        time.sleep(0.3)

    began = time.monotonic()
    report = bulk("encode", folder, tmp_path / "out", pool=as_ray, rows=35)
    assert 0.2 < report.busy_s < report.start_s + report.busy_s < time.monotonic() - began - 0.3


def test_a_seed_that_came_between(folder: Path, tmp_path: Path) -> None:
    """A run that began while this one was planned has chosen the seed."""
    out = tmp_path / "out"
    asked = Request("encode", str(folder), str(out), {"draws": "1"}, "mnist-2d")
    plan = planned(Settings(models=MODELS), asked)
    first = bulk("encode", folder, out, options={"draws": 1})
    with pytest.raises(StartError, match=f"whose seed is {first.seed}"):
        begin(Folder(str(out)), plan.record, plan.rows)


def test_another_source_needs_another_place(folder: Path, tmp_path: Path) -> None:
    """Even if it has as many images: pictures of both would lie side by side."""
    bulk("reconstruct", folder / "0", tmp_path / "out")
    with pytest.raises(StartError, match=r"whose source is .*pictures/0, not .*pictures"):
        bulk("reconstruct", folder, tmp_path / "out")


def test_processes_elsewhere_find_the_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are those of the process that begins the run."""
    monkeypatch.chdir(tmp_path)
    job = planned(Settings(models=MODELS), Request("encode", folder.name, "out", model="mnist-2d")).job
    assert (job.source, job.target) == (str(folder), str(tmp_path / "out"))


def test_names_of_all_kinds(tmp_path: Path, levels: Levels) -> None:
    """Spaces, other alphabets, and characters that mean something in a URL or a glob; with and without a folder."""
    names = ["ä b.png", "100%25.png", "a#b?c.png", "[1].png", "中/文.tif", "x.tar.png", "c::d.png", "-v.png"]
    home = tmp_path / "my scans [2] ü"
    for name, image in zip(names, levels, strict=False):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(home / name)
    assert bulk("reconstruct", home, tmp_path / "out [#] ö").done == len(names)
    found = {str(path.relative_to(tmp_path / "out [#] ö")) for path in (tmp_path / "out [#] ö").rglob("*.*")}
    assert {name for name in found if not name.startswith("_")} == set(names)


@pytest.mark.parametrize("url", ["memory://out", "{tmp_path}/out"])
def test_a_file_is_whole_or_not_there(url: str, tmp_path: Path) -> None:
    """Also where its writing fails; closing a remote file would upload its beginning."""
    folder = Folder(url.format(tmp_path=tmp_path))
    with pytest.raises(OSError, match="full"), folder.written("part") as file:  # noqa: PT012  # it is what is tested
        file.write(b"PAR1")
        raise OSError("full")
    assert folder.names() == []
