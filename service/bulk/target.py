"""What a bulk run writes: Parquet or image files, and beside them the records that let a run go on where one ended."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from service.bulk.files import HOME, Folder, Hashed, digest_of
from service.codecs.image import PNG, TIFF
from service.codecs.payload import Answer
from service.codecs.source import Source as Kept
from service.errors import StartError
from service.operations.inference.vae import Result

Form = Literal["parquet", "images"]
RECORD, ERRORS, PARTS = f"{HOME}/run.json", f"{HOME}/errors.parquet", f"{HOME}/parts"
GROUP_BYTES = 2**25
"""Bytes of the numbers of a row group."""
TIFFS = (".tif", ".tiff")
ERROR_COLUMNS = pa.schema([("row", pa.int64()), ("path", pa.string()), ("key", pa.string()), ("code", pa.string()),
                           ("error", pa.string())])  # fmt: skip


class Row(NamedTuple):
    """A row of the source.

    Attributes:
        place: Its place, of which its noise is a function.
        row: Its number in its file; of picture files, in the source.
        path: Its file, below the source.
        key: Name of its sample in a shard; empty elsewhere.
    """

    place: int
    row: int
    path: str
    key: str


class Failure(NamedTuple):
    """A row that has no result, and why; see `Row`."""

    place: int
    row: int
    path: str
    key: str
    code: str
    error: str


class PartRecord(NamedTuple):
    """What is known of a part that is done.

    Attributes:
        content: Digest of what was read.
        outputs: Digest of each file that was written, by name.
        rows: Rows with results.
        failed: Rows without.
    """

    content: str
    outputs: dict[str, str]
    rows: int
    failed: list[Failure]


class Target:
    """The folder of the results.

    Args:
        folder: The folder.
        form: What is written.
        about: Metadata of the tables: model, version, fingerprint, operation, seed, options.
        fixed: Whether all arrays of a name have one shape, because images of the model have.
        keyed: Whether rows have keys.
    """

    def __init__(self, folder: Folder, form: Form, about: Mapping[str, str], *, fixed: bool, keyed: bool) -> None:
        self.folder, self.form, self.about, self.fixed, self.keyed = folder, form, about, fixed, keyed

    def record_of(self, part: str) -> PartRecord | None:
        """The record of a part; None where it is not done."""
        found = self.folder.read_json(f"{PARTS}/{part}.json")
        if found is None:
            return None
        failed = [Failure(*failure) for failure in found["failed"]]
        return PartRecord(found["content"], found["outputs"], found["rows"], failed)

    def is_whole(self, record: PartRecord) -> bool:
        """Whether the files of a part hold what was written."""
        return all(self.folder.digest(name) == digest for name, digest in record.outputs.items())

    def keep_record(self, part: str, record: PartRecord) -> None:
        """Write the record of a part, after everything else of it."""
        self.folder.write(f"{PARTS}/{part}.json", json.dumps(record._asdict()).encode())

    def remove_from(self, task: str, count: int) -> None:
        """Remove the parts of a shard after its first ones, which an earlier run has written of more samples."""
        while (record := self.record_of(part := f"{task}-{count:05d}")) is not None:
            for name in (*record.outputs, f"{PARTS}/{part}.json"):
                self.folder.remove(name)
            count += 1

    def writer(self, part: str) -> PartWriter:
        """A writer of the results of a part."""
        return (TableWriter if self.form == "parquet" else ImageWriter)(self, part)


class PartWriter(AbstractContextManager["PartWriter"]):
    """Writes the results of one part. After the block, `outputs` has the digests of its files."""

    def __init__(self, target: Target, part: str) -> None:
        self.target, self.part = target, part
        self.outputs: dict[str, str] = {}

    @abstractmethod
    def add(self, rows: Sequence[Row], result: Result, kept: Sequence[Kept | None]) -> None:
        """Write the results of some rows.

        Args:
            rows: The rows.
            result: Their results.
            kept: What a picture keeps of the one that was read, by row.
        """

    def leave_out(self, failure: Failure) -> None:
        """Remove the result that an earlier run may have written of a row."""

    def __exit__(self, *raised: object) -> None:
        """Write nothing more."""


class ImageWriter(PartWriter):
    """A picture a row: TIFF of TIFF, PNG of all others."""

    def add(self, rows: Sequence[Row], result: Result, kept: Sequence[Kept | None]) -> None:
        """Write the pictures."""
        for k, (row, known) in enumerate(zip(rows, kept, strict=True)):
            answer = Answer({"images": result.outputs["images"][k : k + 1]}, self.target.about, source=known or Kept())
            name = picture_of(row, self.part)
            codec = TIFF if name.endswith(TIFFS) else PNG
            assert codec.write is not None
            content = codec.write(answer)
            assert content is not None
            content = bytes(content)
            self.target.folder.write(name, content)
            self.outputs[name] = digest_of(content)

    def leave_out(self, failure: Failure) -> None:
        """Remove its picture, if this part has written it."""
        name, earlier = picture_of(Row(*failure[:4]), self.part), self.target.record_of(self.part)
        if earlier is not None and name in earlier.outputs and name not in self.outputs:
            self.target.folder.remove(name)


def picture_of(row: Row, part: str) -> str:
    """The name of the picture of a row, below the results."""
    if row.key:
        return f"{_stem(row.path)}/{row.key}.png"
    path = PurePosixPath(row.path)
    if path.suffix.lower() in (".parquet", ".pq"):
        return f"part-{part}/{row.place:09d}.png"
    return str(path if path.suffix.lower() in TIFFS else path.with_suffix(".png"))


def _stem(name: str) -> str:
    for ending in (".tar.gz", ".tgz", ".tar"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


class TableWriter(PartWriter):
    """A Parquet file of all rows of a part."""

    def __init__(self, target: Target, part: str) -> None:
        super().__init__(target, part)
        self._name = f"part-{part}.parquet"
        self._open = ExitStack()
        self._writer: parquet.ParquetWriter | None = None
        self._hashed: Hashed | None = None
        self._waiting: list[pa.Table] = []

    def add(self, rows: Sequence[Row], result: Result, kept: Sequence[Kept | None]) -> None:  # noqa: ARG002  # pictures
        """Write the rows; small ones once there are enough for a row group."""
        self._waiting.append(self._table(rows, result))
        if sum(table.nbytes for table in self._waiting) >= GROUP_BYTES:
            self._flush()

    def _table(self, rows: Sequence[Row], result: Result) -> pa.Table:
        fields: list[pa.Field] = []
        columns: list[pa.Array] = []

        def put(name: str, array: pa.Array, shape: Sequence[int] | None = None) -> None:
            metadata = None if shape is None else {"shape": json.dumps(list(shape))}
            fields.append(pa.field(name, array.type, metadata=metadata))
            columns.append(array)

        put("path", pa.array([row.path for row in rows]))
        put("row", pa.array([row.row for row in rows], pa.int64()))
        if self.target.keyed:
            put("key", pa.array([row.key for row in rows]))
        about = {
            name: known for name, known in result.about.items() if _is_column(known, len(rows)) and name != "notes"
        }
        for name, array in {**result.outputs, **about}.items():
            values = np.asarray(array)
            if values.ndim == 1:
                put(name, pa.array(values))
            elif self.target.fixed:
                flat = pa.array(values.ravel())
                put(name, pa.FixedSizeListArray.from_arrays(flat, values[0].size), values.shape[1:])
            else:
                ends = np.arange(len(values) + 1, dtype=np.int64) * values[0].size
                put(name, pa.LargeListArray.from_arrays(ends, pa.array(values.ravel())))
                put(f"{name}_shape", pa.array([list(values.shape[1:])] * len(values), pa.list_(pa.int32())))
        put("notes", pa.array(_notes(rows, result), pa.string()))
        return pa.table(columns, schema=pa.schema(fields, metadata=self.target.about))

    def _flush(self) -> None:
        table = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting = []
        if self._writer is None:
            self._hashed = Hashed(self._open.enter_context(self.target.folder.written(self._name)))
            writer = parquet.ParquetWriter(
                pa.PythonFile(self._hashed, "w"), table.schema, use_dictionary=["path", "notes"]
            )  # numbers hardly repeat
            self._writer = self._open.enter_context(writer)
        self._writer.write_table(table)

    def __exit__(self, *raised: object) -> None:
        """Write what waits, and the end of the file; a part without any results has none."""
        if raised[0] is not None:
            self._open.__exit__(*raised)  # type: ignore[arg-type]  # nothing is left of the file
            return
        with self._open:
            if self._waiting:
                self._flush()
        if self._hashed is None:
            self.target.folder.remove(self._name)
        else:
            self.outputs[self._name] = self._hashed.digest()


def _is_column(known: Any, rows: int) -> bool:
    return isinstance(known, np.ndarray | list) and len(known) == rows


def _notes(rows: Sequence[Row], result: Result) -> list[str | None]:
    """The codes of the notes on each row, with commas between; None without any."""
    found: dict[int, list[str]] = {}
    for note in result.about.get("notes", ()):
        for place in note["rows"]:
            found.setdefault(place, []).append(note["code"])
    return [",".join(found[row.place]) if row.place in found else None for row in rows]


def write_errors(folder: Folder, failures: Iterable[Failure]) -> None:
    """Write the table of the rows without results."""
    table = pa.Table.from_pylist([failure._asdict() for failure in sorted(failures)], ERROR_COLUMNS)
    with folder.written(ERRORS) as file:
        parquet.write_table(table, pa.PythonFile(file, "w"))


def begin(folder: Folder, record: Mapping[str, Any], rows: int | None) -> None:
    """Write of which run the results are.

    Args:
        folder: The folder of the results.
        record: The run.
        rows: Rows of the source; None of shards, whose rows are not counted.

    Raises:
        StartError: The results that are there are of more rows, or of another run.
    """
    continued(folder, dict(record))
    before = (folder.read_json(RECORD) or {}).get("rows_of_source")
    if before is not None and rows is not None and rows < before:
        raise StartError(
            f"the results at {folder.url} are of {before} rows, and the source now has {rows}; choose another place, "
            "or remove them"
        )
    folder.write(RECORD, f"{json.dumps({**record, 'rows_of_source': rows}, indent=2)}\n".encode())


def continued(folder: Folder, record: dict[str, Any]) -> dict[str, Any]:
    """What is written of a run, if the results that are there are its own.

    Args:
        folder: The folder of the results.
        record: The run. A seed of None takes that of the earlier run that it continues.

    Returns:
        The record with the seed.

    Raises:
        StartError: What is there is of another run.
    """
    earlier = folder.read_json(RECORD)
    if earlier is None:
        if any(not name.startswith(f"{HOME}/") for name in folder.names()):
            raise StartError(f"{folder.url} holds other files; name a new or an empty folder for the results")
        earlier = {}
    if record["seed"] is None:
        record["seed"] = earlier.get("seed")
    for name, value in record.items():
        if earlier and earlier.get(name) != json.loads(json.dumps(value)):
            raise StartError(
                f"the results at {folder.url} are of a run whose {name} is {earlier.get(name)}, not {value}; choose "
                "another place, or remove them"
            )
    return record


def check_pictures(names: Sequence[str]) -> None:
    """Refuse picture files whose results would become one file, and shards whose results would be in one folder.

    Raises:
        StartError: The message names two of them.
    """
    found: dict[str, str] = {}
    for name in names:
        picture = _stem(name) if _stem(name) != name else picture_of(Row(0, 0, name, ""), "")
        other = found.setdefault(picture, name)
        if other != name:
            raise StartError(f"{other} and {name} would both become {picture}; rename one")
