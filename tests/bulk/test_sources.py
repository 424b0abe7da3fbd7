"""Sources: the same images in every form that is read have the same latents."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import dataset, parquet

from service.bulk.files import DRAFTS, Folder
from service.bulk.shared import SharedArrays
from service.bulk.source import Source, Task
from service.errors import StartError
from tests.bulk.conftest import Levels, bulk, png

COUNT = 70


def listed(array: Any, *sizes: int) -> pa.Array:
    """Numbers as fixed-size lists in lists."""
    found = pa.array(array.ravel())
    for size in reversed(sizes):
        found = pa.FixedSizeListArray.from_arrays(found, size)
    return found


FORMS: dict[str, Callable[[Levels], pa.Array]] = {
    "flat levels": lambda images: listed(images, 784),
    "lists of any length": lambda images: pa.array(list(images.reshape(-1, 784)), pa.list_(pa.uint8())),
    "rows of pixels": lambda images: listed(images, 28, 28),
    "rows of pixels in lists": lambda images: pa.array(images.tolist(), pa.large_list(pa.list_(pa.uint8()))),
    "channels first": lambda images: listed(images, 1, 28, 28),
    "channels last": lambda images: listed(images, 28, 28, 1),
    "floats": lambda images: listed(images / np.float32(255.0), 784),
    "doubles": lambda images: listed((images / np.float32(255.0)).astype(np.float64), 784),
    "tensors": lambda images: pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images)),
    "files": lambda images: pa.array([png(image) for image in images]),
    "Hugging Face's": lambda images: pa.array([{"bytes": png(image), "path": "x.png"} for image in images]),
}


@pytest.fixture(scope="module")
def expected(levels: Levels, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Means of the first images, from pictures in a folder."""
    home = tmp_path_factory.mktemp("expected")
    (home / "in").mkdir()
    for k, image in enumerate(levels[:COUNT]):
        (home / "in" / f"{k:03d}.png").write_bytes(png(image))
    bulk("encode", home / "in", home / "out")
    return means(home / "out")


def means(target: Path | str, files: Any = None) -> Any:
    """The means of all rows, in the order of their files and rows."""
    table = dataset.dataset(target, filesystem=files).to_table().sort_by([("path", "ascending"), ("row", "ascending")])
    return np.array(table.column("mean").to_pylist(), np.float32)


@pytest.mark.parametrize("form", FORMS)
def test_a_table_of_any_form(
    written: Callable[..., Path], levels: Levels, expected: Any, tmp_path: Path, form: str
) -> None:
    """In two files whose row groups and parts do not agree; other columns do not disturb."""
    images = levels[:COUNT]
    table = pa.table({"id": list(range(COUNT)), "image": FORMS[form](images), "label": ["digit"] * COUNT})
    written(table.slice(0, 40), "set/a.parquet", row_group_size=16)
    written(table.slice(40), "set/b.parquet")
    report = bulk("encode", tmp_path / "set", tmp_path / "out", rows=24)
    assert (report.done, report.failed) == (COUNT, [])
    assert np.array_equal(means(tmp_path / "out"), expected)


def test_latents_go_back_as_images(written: Callable[..., Path], levels: Levels, tmp_path: Path) -> None:
    """What a run has written in lists is a source again, by the shape in the metadata."""
    bulk("reconstruct", written(pa.table({"image": listed(levels[:COUNT], 784)})), tmp_path / "out", form="parquet")
    report = bulk("encode", tmp_path / "out", tmp_path / "again", column="images")
    assert (report.done, report.failed) == (COUNT, [])


def shard(path: Path, images: Levels, first: int, *, mode: str = "w") -> None:
    """A WebDataset shard of pictures with their labels."""
    with tarfile.open(path, mode) as tar:
        for k, image in enumerate(images, first):
            for name, content in ((f"{k:03d}.cls", b"7"), (f"{k:03d}.png", png(image)), (f"{k:03d}.json", b"{}")):
                entry = tarfile.TarInfo(f"digits/{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_shards(tmp_path: Path, levels: Levels, expected: Any) -> None:
    """Each sample is a row with its key; a compressed shard, and one that goes on where it was broken off."""
    home = tmp_path / "shards"
    home.mkdir()
    shard(home / "a-0.tar", levels[:40], 0)
    shard(home / "b-1.tar.gz", levels[40:COUNT], 40, mode="w:gz")
    report = bulk("encode", home, tmp_path / "out", rows=16)
    assert (report.done, report.failed) == (COUNT, [])
    assert np.array_equal(means(tmp_path / "out"), expected)
    found = dataset.dataset(tmp_path / "out").to_table()
    assert found.column("key").to_pylist() == [f"digits/{k:03d}" for k in range(COUNT)]
    record = tmp_path / "out" / "_vae-bulk" / "parts" / "00000-00001.json"
    record.unlink()
    again = bulk("encode", home, tmp_path / "out", rows=16)
    assert (again.done, again.before) == (16, 54)
    pictures = bulk("reconstruct", home, tmp_path / "pictures")
    assert pictures.done == COUNT
    assert (tmp_path / "pictures" / "b-1" / "digits" / "069.png").exists()


def test_draws_of_a_shard_are_those_of_its_place(tmp_path: Path, levels: Levels) -> None:
    """More samples in one shard change nothing in the next; equal images in two shards have different draws."""
    home = tmp_path / "shards"
    home.mkdir()
    shard(home / "a.tar", levels[:3], 0)
    shard(home / "b.tar", levels[:3], 0)
    asked = {"options": {"draws": 1, "seed": 1}}
    bulk("encode", home, tmp_path / "one", **asked)
    shard(home / "a.tar", levels[:9], 0)
    bulk("encode", home, tmp_path / "two", **asked)
    one, two = (parquet.read_table(tmp_path / out / "part-00001-00000.parquet") for out in ("one", "two"))
    assert one.equals(two)
    first = parquet.read_table(tmp_path / "one" / "part-00000-00000.parquet")
    assert first.column("mean").equals(one.column("mean"))
    assert not first.column("latents").equals(one.column("latents"))


def test_a_shard_that_was_cut(tmp_path: Path, levels: Levels) -> None:
    """The rows that it has no more are no results either."""
    home = tmp_path / "shards"
    home.mkdir()
    shard(home / "a.tar", levels[:40], 0)
    bulk("encode", home, tmp_path / "out", rows=16)
    shard(home / "a.tar", levels[:16], 0)
    report = bulk("encode", home, tmp_path / "out", rows=16)
    assert (report.done, report.before) == (0, 16)
    assert dataset.dataset(tmp_path / "out").to_table().num_rows == 16


def test_samples_of_bad_names(tmp_path: Path, levels: Levels) -> None:
    """None writes outside the results, none over another; hidden files are left out, as in folders."""
    home = tmp_path / "shards"
    home.mkdir()
    with tarfile.open(home / "a.tar", "w") as tar:
        for name in ("a.png", "../../../evil.png", "b/._c.png", "b/c.png", "a.png"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content := png(levels[0]))
            tar.addfile(entry, io.BytesIO(content))
    report = bulk("reconstruct", home, tmp_path / "out" / "deep")
    assert report.done == 2
    assert [(one.row, one.code, one.error) for one in report.failed] == [
        (1, "invalid_value", "../../../evil: its name leads out of the shard; rename the sample"),
        (3, "invalid_value", "a: its name occurs before; rename the sample"),
    ]
    assert {path.name for path in tmp_path.rglob("*.png")} == {"a.png", "c.png"}
    (home / "a.tgz").write_bytes((home / "a.tar").read_bytes())
    with pytest.raises(StartError, match=r"a.tar and a.tgz would both become a; rename one"):
        bulk("reconstruct", home, tmp_path / "both")


def test_a_large_row_group_is_read_bit_by_bit(written: Callable[..., Path]) -> None:
    """The memory of the first rows does not grow with their row group."""
    noise = np.random.default_rng(0).integers(0, 256, (4000, 4096), np.uint8)
    path = written(pa.table({"image": [one.tobytes() for one in noise]}))
    source = Source(Folder(str(path.parent)), "parquet", 64)
    tracemalloc.start()
    with closing(source):
        next(source.read(source.tasks([path.name])[0]))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 2**23 < path.stat().st_size / 1.9


@pytest.mark.parametrize("limit", [2**30, 0])
def test_a_large_row_group_is_decoded_once(
    written: Callable[..., Path], levels: Levels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Processes share it through a file, whatever order they read in; not where its numbers would fill a disk."""
    monkeypatch.setattr("service.bulk.source.SHARED_BYTES", limit)
    path = written(pa.table({"image": listed(levels, 784)}), row_group_size=102)
    folder, target = Folder(str(path.parent)), Folder(str(tmp_path / "out"))
    shared = tmp_path / "out" / DRAFTS
    one, other = (Source(folder, "parquet", 8, shared=target) for _ in range(2))
    tasks = one.tasks([path.name])

    def values(source: Source, task: Task) -> Any:
        (block,) = source.read(task)
        assert (block.first, block.row) == (task.first, task.start)
        return block.values

    assert np.array_equal(values(one, tasks[1]), levels.reshape(-1, 784)[8:16])
    assert [file.suffix for file in shared.glob("*[!k]")] == ([".arrow"] if limit else [])
    if limit:
        metadata = parquet.ParquetFile(path).metadata.row_group(0).column(0)
        with path.open("r+b") as file:  # so nobody decodes it again
            file.write(bytes(4 + metadata.total_compressed_size))
    for source, task in [(other, tasks[11]), (one, tasks[0]), (other, tasks[4])]:
        expected = levels.reshape(-1, 784)[task.start : task.start + 8]
        assert np.array_equal(values(source, task), expected)
    for task in tasks[13:]:  # of the next row group
        for source in (other, one):
            assert np.array_equal(values(source, task), levels.reshape(-1, 784)[task.start : task.start + 8])
    for source in (one, other):
        assert bool(limit) == any(shared.glob("*.arrow"))
        source.close()
    assert not any(shared.glob("*.arrow"))


def test_a_row_group_over_the_edge_of_a_part(written: Callable[..., Path], levels: Levels, tmp_path: Path) -> None:
    """The part has rows of two shared row groups; and a row group is written again for who comes late."""
    path = written(pa.table({"image": listed(levels, 784)}), row_group_size=100)
    source = Source(Folder(str(path.parent)), "parquet", 8, shared=Folder(str(tmp_path / "out")))
    tasks = source.tasks([path.name])
    for task in (tasks[12], tasks[2], tasks[24], tasks[12]):
        (block,) = source.read(task)
        assert np.array_equal(block.values, levels.reshape(-1, 784)[task.start : task.start + 8])
    source.close()


def test_a_row_group_that_was_not_written_to_its_end(tmp_path: Path) -> None:
    """Nothing is left of it, and the next process writes it."""

    def broken() -> Iterator[pa.Array]:
        yield pa.array([1])
        raise OSError("gone")

    folder = Folder(str(tmp_path))
    with pytest.raises(OSError, match="gone"):
        SharedArrays(folder, "group", broken())
    with closing(SharedArrays(folder, "group", iter([pa.array([1]), pa.array([2, 3])]))) as arrays:
        assert [arrays[k].to_pylist() for k in (1, 0)] == [[2, 3], [1]]
        assert [path.suffix for path in (tmp_path / DRAFTS).iterdir() if path.suffix != ".lock"] == [".arrow"]


def test_a_glob_and_one_file(folder: Path, tmp_path: Path, expected: Any) -> None:
    """Names are below the last folder without a star."""
    bulk("encode", f"{folder}/*/0[0-3]*.png", tmp_path / "glob")
    found = dataset.dataset(tmp_path / "glob").to_table()
    assert found.column("path").to_pylist() == [f"0/{k:03d}.png" for k in range(40)]
    assert np.array_equal(means(tmp_path / "glob"), expected[:40])
    bulk("encode", folder / "0" / "007.png", tmp_path / "one")
    assert np.array_equal(means(tmp_path / "one"), expected[7:8])


def test_results_inside_the_source_are_no_images(folder: Path) -> None:
    """A second run finds the images alone."""
    for expected_before in (0, 70):
        report = bulk("reconstruct", folder, folder / "out")
        assert (report.done, report.before) == (70 - expected_before, expected_before)


def test_one_kind_at_a_time(folder: Path, written: Callable[..., Path], levels: Levels, tmp_path: Path) -> None:
    """Pictures beside tables are an error that shows the glob; a broken table names itself."""
    written(pa.table({"image": listed(levels, 784)}), "pictures/x.parquet")
    with pytest.raises(StartError, match=r"with a glob in quotes, such as '.*pictures/\*\*/\*\.png'"):
        bulk("encode", folder, tmp_path / "out")
    (folder / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(StartError, match=r"x.parquet is no Parquet file"):
        bulk("encode", folder / "x.parquet", tmp_path / "out")
    (folder / "y.tar").write_bytes(b"\1" * 2000)
    with pytest.raises(OSError, match=r"y.tar is no whole tar file"):
        bulk("encode", folder / "y.tar", tmp_path / "out")


@pytest.fixture(scope="module")
def store() -> Any:
    """A real server that speaks S3, and the options of fsspec for it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}  # pragma: allowlist secret
    server.stop()


def test_from_a_store_to_a_store(
    store: dict[str, Any], levels: Levels, expected: Any, written: Callable[..., Path]
) -> None:
    """Pictures, and a table, out of S3 and results into it; the second run finds them."""
    import fsspec  # noqa: PLC0415  # slow to import

    files = fsspec.filesystem("s3", use_listings_cache=False, **store)
    files.mkdir("digits")
    for k, image in enumerate(levels[:COUNT]):
        files.pipe_file(f"digits/in/{k:03d}.png", png(image))
    table = written(pa.table({"image": listed(levels[:COUNT], 784)}))
    files.put_file(str(table), "digits/table/images.parquet")
    options = {"source_options": store, "target_options": store}
    for source, name in (("s3://digits/in", "out"), ("s3://digits/table/images.parquet", "rows")):
        for before in (0, COUNT):
            report = bulk("encode", source, f"s3://digits/{name}", rows=30, **options)  # type: ignore[arg-type]
            assert (report.done, report.before, report.failed) == (COUNT - before, before, [])
        assert np.array_equal(means(f"digits/{name}", files), expected)
