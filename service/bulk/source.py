"""What a bulk run reads: picture files, Parquet data sets, WebDataset shards. It is cut into parts of fixed rows.

The parts, and the place of each row, depend on the source alone, never on who reads them.
"""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain, groupby
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import parquet

from service.bulk.files import Folder, digest_of
from service.bulk.shared import SharedArrays
from service.errors import InvalidShape, InvalidValue, ServiceError, StartError, Unreadable, one_line

Kind = Literal["pictures", "parquet", "tar"]
PICTURES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".npy"
)  # fmt: skip
ENDINGS: dict[Kind, tuple[str, ...]] = {
    "pictures": PICTURES,
    "parquet": (".parquet", ".pq"),
    "tar": (".tar", ".tar.gz", ".tgz"),
}
"""Endings of the files of each kind, in lower case."""
AHEAD = 8
"""Remote files that are fetched at a time."""
BODIES = 16
"""Pictures in memory at a time, as files."""
READ_BYTES = 2**20
"""Bytes of a table that are read at a time; without this, pyarrow reads the column of a whole row group."""
SHARED_PARTS, SHARED_BYTES = 4, 2**30
"""Parts that a row group must have, and bytes of numbers that it may have, to be decoded once for all processes."""
SHARD_ROWS = 2**24
"""Places of the rows of one shard: that many lie between the first rows of two, so that none need be counted."""

Value = bytes | NDArray[Any] | ServiceError
"""A file, or the numbers of an image, or why there is neither."""


class Task(NamedTuple):
    """What one process does at a time: a part, or a shard with all of its parts.

    Attributes:
        name: Name of the part; of a shard, the beginning of the names of its parts.
        paths: Its files, below the source.
        first: Place of its first row.
        start: Its first row in the file of a table.
        rows: Number of rows; None of a shard, whose rows are not counted.
    """

    name: str
    paths: tuple[str, ...]
    first: int
    start: int = 0
    rows: int | None = None


class Block(NamedTuple):
    """Consecutive rows of a part.

    Attributes:
        part: Name of the part.
        first: Place of the first row.
        row: Its number in its file; of picture files, in the source.
        paths: File of each row, below the source.
        keys: Names of the samples of a shard; empty elsewhere.
        values: A value a row, or the numbers of all rows (n, ...).
    """

    part: str
    first: int
    row: int
    paths: Sequence[str]
    keys: Sequence[str]
    values: NDArray[Any] | list[Value]


class Found(NamedTuple):
    """The files of a source.

    Attributes:
        url: The folder that they are below.
        kind: Their kind.
        names: Their paths below the folder, in order.
        ignored: Number of files of other endings.
    """

    url: str
    kind: Kind
    names: list[str]
    ignored: int


def find(url: str, options: Mapping[str, Any], apart: str) -> Found:
    """Find the files of a source; hidden ones, and those whose names begin with `_`, are left out.

    Args:
        url: A folder, a glob, a file, or a URL of one of these.
        options: Options of its file system, as fsspec takes them.
        apart: Path of the run's results, which are no images.

    Raises:
        StartError: There are no images, or of several kinds.
    """
    folder, names = _listed(url, options, apart)
    kinds = [kind for kind in ENDINGS if any(name.lower().endswith(ENDINGS[kind]) for name in names)]
    if not kinds:
        endings = ", ".join(chain(*ENDINGS.values()))
        raise StartError(f"{url} holds no images; their files end in {endings}")
    if len(kinds) > 1:
        raise StartError(
            f"{url} holds files of several kinds, {' and '.join(kinds)}; name those of one kind with a glob in quotes, "
            f"such as '{folder.url.rstrip('/')}/**/*{ENDINGS[kinds[0]][0]}'"
        )
    (kind,) = kinds
    images = [name for name in names if name.lower().endswith(ENDINGS[kind])]
    return Found(folder.absolute, kind, images, len(names) - len(images))


def _listed(url: str, options: Mapping[str, Any], apart: str) -> tuple[Folder, list[str]]:
    """The folder that a URL names, and the files in it.

    Raises:
        StartError: There is nothing.
    """
    whole, star = Folder(url, options), "*" in url
    try:
        if star:
            paths = whole.files.glob(whole.root)
        else:
            paths = [whole.root] if whole.files.isfile(whole.root) else whole.files.find(whole.root)
    except OSError as error:
        raise StartError(f"{url} cannot be listed: {one_line(error)}") from error
    if not paths:
        raise StartError(f"nothing is at {url}; name a folder, a file, a glob in quotes, or a URL of one of these")
    base = url.partition("*")[0] if star else url
    one = star or paths == [whole.root]
    folder = Folder((base.rpartition("/")[0] or ("/" if base.startswith("/") else ".")) if one else base, options)
    names = (
        path.removeprefix(folder.root).lstrip("/") for path in paths if not (apart and path.startswith(f"{apart}/"))
    )
    return folder, sorted(name for name in names if not any(part.startswith((".", "_")) for part in name.split("/")))


class Source:
    """Reads the files of a source, part by part.

    Args:
        folder: The folder that they are below.
        kind: Their kind.
        rows: Rows of a part.
        column: Column of the images of a table; empty takes the only one that may hold them.
        shared: Local folder of the results, through which processes share row groups; None where each decodes for
            itself.
    """

    def __init__(self, folder: Folder, kind: Kind, rows: int, column: str = "", shared: Folder | None = None) -> None:
        self.folder, self.kind = folder, kind
        self._rows, self._column, self._shared = rows, column, shared
        self._table: _Table | None = None

    def tasks(self, names: Sequence[str]) -> list[Task]:
        """All tasks on some files, in the order of the rows.

        Raises:
            StartError: A table cannot be read.
        """
        size = self._rows
        if self.kind == "tar":
            return [Task(f"{k:05d}", (name,), k * SHARD_ROWS) for k, name in enumerate(names)]
        if self.kind == "pictures":
            parts = [tuple(names[at : at + size]) for at in range(0, len(names), size)]
            return [Task(f"{k:08d}", paths, k * size, rows=len(paths)) for k, paths in enumerate(parts)]
        tasks: list[Task] = []
        first = 0
        for name in names:
            with closing(_Table(self.folder, name, self._column, size)) as table:
                rows = table.rows
            for at in range(0, rows, size):
                tasks.append(Task(f"{len(tasks):08d}", (name,), first + at, at, min(size, rows - at)))
            first += rows
        return tasks

    def close(self) -> None:
        """Close the table that is open."""
        if self._table is not None:
            self._table.close()
            self._table = None

    def read(self, task: Task) -> Iterator[Block]:
        """The rows of a task. A failed read is the value of its row.

        Raises:
            OSError: A table or a shard cannot be read.
        """
        if self.kind == "pictures":
            return self._files(task)
        return self._samples(task) if self.kind == "tar" else self._numbers(task)

    def _files(self, task: Task) -> Iterator[Block]:
        bodies = map(self._body, task.paths) if self.folder.local else self._ahead(task.paths)
        for at in range(0, len(task.paths), BODIES):
            paths = task.paths[at : at + BODIES]
            values = [next(bodies) for _ in paths]
            yield Block(task.name, task.first + at, task.first + at, paths, (), values)

    def _body(self, name: str) -> Value:
        try:
            return self.folder.read(name)
        except OSError as error:
            return Unreadable(f"the file cannot be read: {one_line(error)}")

    def _ahead(self, names: Sequence[str]) -> Iterator[Value]:
        """Fetch a few files at a time."""
        with ThreadPoolExecutor(AHEAD) as threads:
            for at in range(0, len(names), BODIES):
                yield from threads.map(self._body, names[at : at + BODIES])

    def _samples(self, task: Task) -> Iterator[Block]:
        """The pictures of a shard: of each sample the first member whose ending is that of one."""
        (name,) = task.paths
        found: list[tuple[str, Value]] = []
        known: set[str] = set()
        at = 0
        for key, body in _members(self.folder, name):
            problem = "its name occurs before" if key in known else "its name leads out of the shard"
            wrong = key in known or ".." in key.split("/")
            found.append((key, InvalidValue(f"{key}: {problem}; rename the sample") if wrong else body))
            known.add(key)
            full = len(found) == BODIES or (at + len(found)) % self._rows == 0
            if full:
                yield self._of_shard(task, at, found)
                at, found = at + len(found), []
        if found:
            yield self._of_shard(task, at, found)

    def _of_shard(self, task: Task, at: int, found: Sequence[tuple[str, Value]]) -> Block:
        keys, bodies = [key for key, _ in found], [body for _, body in found]
        part = f"{task.name}-{at // self._rows:05d}"
        return Block(part, task.first + at, at, task.paths * len(found), keys, [*bodies])

    def _numbers(self, task: Task) -> Iterator[Block]:
        (name,) = task.paths
        assert task.rows is not None
        if self._table is None or self._table.name != name:
            self.close()
            self._table = _Table(self.folder, name, self._column, self._rows, self._shared)
        table, at = self._table, task.start
        arrays = table.bodies(at, task.rows) if table.encoded else [table.numbers(at, task.rows)]
        for array in arrays:
            paths = [name] * len(array)
            yield Block(task.name, task.first + at - task.start, at, paths, (), values_of(array, table.shape))
            at += len(array)


def _members(folder: Folder, name: str) -> Iterator[tuple[str, bytes]]:
    """Key and picture of each sample of a tar file, in order; the file is read once, from its beginning.

    A sample is the consecutive members whose names agree up to the first dot after the last slash.
    Source: https://github.com/webdataset/webdataset, "The WebDataset Format".
    """
    with folder.files.open(folder.path(name), "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*") as shard:
                files = (one for one in shard if one.isfile() and not PurePosixPath(one.name).name.startswith("."))
                for key, members in groupby(files, _key):
                    body = None
                    for member in members:
                        if body is None and member.name.lower().endswith(PICTURES):
                            opened = shard.extractfile(member)
                            body = None if opened is None else opened.read()
                    if body is not None:
                        yield key, body
        except (tarfile.TarError, EOFError) as error:
            raise OSError(f"{name} is no whole tar file: {one_line(error)}") from error


def _key(member: tarfile.TarInfo) -> str:
    folder, _, base = member.name.removeprefix("./").rpartition("/")
    return f"{folder}/{base.partition('.')[0]}" if folder else base.partition(".")[0]


class _Table:
    """A Parquet file that is read forward: rows that are passed over are decoded, unless they fill row groups.

    Large row groups of numbers are shared with other processes, as their decoding can take longer than a model.

    Args:
        folder: The folder of the file.
        name: Its name.
        column: Column of the images; empty takes the only one that may hold them.
        part: Rows of a part.
        shared: See `Source`.

    Attributes:
        name: Its name.
        rows: Number of rows.
        shape: Shape of an image as the metadata of its column says; None where it says nothing.
        encoded: Whether the column holds picture files, not numbers.

    Raises:
        StartError: It is no Parquet file, or has no column of images.
    """

    def __init__(self, folder: Folder, name: str, column: str, part: int, shared: Folder | None = None) -> None:
        self.name, self._part, self._target = name, part, shared
        try:
            self._opened = folder.files.open(folder.path(name), "rb")
            self._file = parquet.ParquetFile(self._opened, buffer_size=READ_BYTES, pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            raise StartError(f"{name} is no Parquet file that can be read: {one_line(error)}") from error
        schema = self._file.schema_arrow
        self._column = column or _only_column(schema, name)
        if self._column not in schema.names:
            raise StartError(f"{name} has no column {self._column}; its columns are {', '.join(schema.names)}")
        field = schema.field(self._column)
        self.shape: tuple[int, ...] | None = None
        if isinstance(field.type, pa.FixedShapeTensorType):
            self.shape = tuple(field.type.shape)
        elif b"shape" in (field.metadata or {}):
            self.shape = tuple(json.loads(field.metadata[b"shape"]))
        self.encoded = not _is_numbers(field.type)
        self._number_bits = 0 if self.encoded else _number_bits(field.type)
        metadata = self._file.metadata
        ends = np.cumsum([metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)])
        self._ends: list[int] = [int(end) for end in ends]
        self.rows = metadata.num_rows
        self._at = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._left: pa.Array | None = None
        self._begun = False
        self._shared: tuple[int, SharedArrays] | None = None

    def close(self) -> None:
        """Close the file."""
        self._leave_shared()
        self._file.close()
        self._opened.close()

    def bodies(self, start: int, count: int) -> Iterator[pa.Array]:
        """The picture files from a row on, a few at a time.

        Args:
            start: The first row.
            count: Number of rows.

        Raises:
            OSError: The file is broken.
        """
        try:
            yield from self._read(start, count)
        except pa.ArrowException as error:
            raise OSError(f"{self.name} is broken: {one_line(error)}") from error

    def numbers(self, start: int, count: int) -> pa.Array:
        """The numbers of a part.

        Args:
            start: Its first row.
            count: Number of its rows.

        Raises:
            OSError: The file is broken, or a shared row group cannot be written.
        """
        try:
            return _one(self._piece(*span) for span in self._spans(start, count))
        except pa.ArrowException as error:
            raise OSError(f"{self.name} is broken: {one_line(error)}") from error

    def _spans(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """The row groups of some rows: (group, first row, number of rows)."""
        end = start + count
        while start < end:
            group = self._group_of(start)
            rows = min(end, self._ends[group]) - start
            yield group, start, rows
            start += rows

    def _piece(self, group: int, start: int, count: int) -> pa.Array:
        """The rows of one part that are in one row group."""
        if self._target is None or not self._is_large(group):
            return _one(self._read(start, count))
        if self._shared is None or self._shared[0] != group:
            self._leave_shared()
            name = f"{digest_of(self.name)}-{group}"
            self._shared = group, SharedArrays(self._target, name, self._pieces(group))
        return self._shared[1][start // self._part - self._begin(group) // self._part]

    def _pieces(self, group: int) -> Iterator[pa.Array]:
        """All rows of a row group, by part."""
        begin, end = self._begin(group), self._ends[group]
        for at in range(begin // self._part * self._part, end, self._part):
            first = max(at, begin)
            yield _one(self._read(first, min(at + self._part, end) - first))

    def _is_large(self, group: int) -> bool:
        """Whether it pays to share a row group; not where its numbers would fill a disk."""
        if self._ends[group] - self._begin(group) <= SHARED_PARTS * self._part:
            return False
        known = self._file.metadata.row_group(group)
        columns = (known.column(k) for k in range(known.num_columns))
        numbers = sum(one.num_values for one in columns if one.path_in_schema.startswith(f"{self._column}."))
        return numbers * self._number_bits // 8 <= SHARED_BYTES

    def _leave_shared(self) -> None:
        if self._shared is not None:
            self._shared[1].close()
            self._shared = None

    def _group_of(self, row: int) -> int:
        return next(k for k, end in enumerate(self._ends) if row < end)

    def _begin(self, group: int) -> int:
        """The first row of a row group."""
        return self._ends[group - 1] if group else 0

    def _read(self, start: int, count: int) -> Iterator[pa.Array]:
        """The column from a row on, a part or a few files at a time."""
        self._seek(start)
        while count:
            array = self._next(count)
            count -= len(array)
            yield array

    def _seek(self, start: int) -> None:
        group = self._group_of(start)
        begin = self._begin(group)
        if not self._begun or not begin <= self._at <= start:
            groups = range(group, len(self._ends))
            size = min(self._part, BODIES) if self.encoded else self._part
            self._batches = self._file.iter_batches(size, groups, [self._column], use_threads=False)
            self._begun, self._left, self._at = True, None, begin
        while self._at < start:
            self._next(start - self._at)

    def _next(self, most: int) -> pa.Array:
        if self._left is None:
            batch = next(self._batches, None)
            if batch is None:
                raise pa.ArrowInvalid("it has fewer rows than its footer says")
            self._left = batch.column(0)
        array, rest = self._left[:most], self._left[most:]
        self._left = rest if len(rest) else None
        self._at += len(array)
        return array


def _one(arrays: Iterable[pa.Array]) -> pa.Array:
    """Consecutive arrays as one, without a copy of a single one."""
    found = list(arrays)
    return found[0] if len(found) == 1 else pa.concat_arrays(found)


def _only_column(schema: pa.Schema, name: str) -> str:
    """The column of the images, where one alone may be it.

    Raises:
        StartError: Several or none may be.
    """
    may = [field.name for field in schema if _is_numbers(field.type) or _bytes_in(field.type) is not None]
    if len(may) == 1:
        return may[0]
    known = ", ".join(schema.names)
    raise StartError(
        f"the images of {name} may be in {' or '.join(may) or 'no column'} of {known}; name one with --column"
    )


def _is_numbers(kind: pa.DataType) -> bool:
    """Whether a type is a list of numbers, of any depth."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    inner = kind.value_type
    return pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_boolean(inner) or _is_numbers(inner)


def _number_bits(kind: pa.DataType) -> int:
    """Bits of a number of a list of numbers, of any depth."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return int(kind.bit_width) if pa.types.is_primitive(kind) else _number_bits(kind.value_type)


def _bytes_in(kind: pa.DataType) -> tuple[()] | tuple[str] | None:
    """Where a type has the bytes of files: itself, or in `bytes` of a struct, as Hugging Face's `Image`; else None."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return ()
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return ("bytes",) if _bytes_in(kind.field("bytes").type) == () else None
    return None


def values_of(array: pa.Array, shape: tuple[int, ...] | None) -> NDArray[Any] | list[Value]:
    """The images of a column: all as one array (n, ...) where their sizes agree, else one by one.

    Args:
        array: Lists of numbers, files, or structs with files in `bytes`.
        shape: Shape of an image that is a flat list; None where it is not known.
    """
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    where = _bytes_in(array.type)
    if where is not None:
        bodies = pc.struct_field(array, where[0]) if where else array
        return [_given(body) for body in bodies.to_pylist()]
    whole = _stacked(array) if array.null_count == 0 else None
    if whole is not None:
        return whole.reshape(len(whole), *shape) if shape is not None and math.prod(shape) == whole[0].size else whole
    return [_row_of(one, shape) for one in array]


def _given(body: bytes | None) -> Value:
    return InvalidValue("the row holds no picture") if body is None else body


def _stacked(array: pa.Array) -> NDArray[Any] | None:
    """Lists of one length as an array, lists in lists too; None where lengths differ or a number is missing."""
    axes = [len(array)]
    while not (pa.types.is_primitive(array.type)):
        if array.null_count:
            return None
        lengths = pc.list_value_length(array)
        if isinstance(array.type, pa.FixedSizeListType):
            axes.append(array.type.list_size)
        else:
            least, most = pc.min_max(lengths).values()
            if least.as_py() != most.as_py():
                return None
            axes.append(int(most.as_py() or 0))
        array = array.flatten()
    return None if array.null_count else array.to_numpy(zero_copy_only=False).reshape(axes)


def _row_of(one: pa.Scalar, shape: tuple[int, ...] | None) -> Value:
    numbers = None if one.as_py() is None else _stacked(pa.array([one.as_py()], one.type))
    if numbers is None:
        return InvalidValue("the row holds no image, or one with numbers missing")
    if shape is not None and numbers[0].size != np.prod(shape):
        return InvalidShape(f"the row holds {numbers[0].size} numbers, not the {shape} of its column")
    return numbers[0] if shape is None else numbers[0].reshape(shape)
