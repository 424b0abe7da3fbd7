"""Tables of many answers: parts of one item each, and the file that they become."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_client.answer import Answer
from vae_client.errors import InvalidRequest, missing
from vae_client.files import replacing, write

Columns = dict[str, NDArray[Any]]
SUFFIXES = (".npz", ".npy", ".csv", ".parquet")
"""Endings of tables."""
ABOUT = ("path", "row", "seed", "level", "noise")
"""Columns beside the arrays that the operation is about."""


def check_packages(path: Path) -> None:
    """Check that the packages that write a table are there, before anything is computed.

    Raises:
        MissingExtra: pyarrow is not installed.
    """
    if path.suffix.lower() == ".parquet":
        _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa  # noqa: PLC0415  # an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise missing("parquet", "pyarrow", "a table in Parquet") from error
    return pa, parquet


def columns(answer: Answer, name: str | None, first: int) -> Columns:
    """The rows of an answer.

    Args:
        answer: The answer.
        name: Path of the file that the rows come from, below the folder; None of an array.
        first: Index of the first row.
    """
    count = len(next(iter(answer.outputs.values())))
    found: Columns = {} if name is None else {"path": np.array([name] * count)}
    found["row"] = np.arange(first, first + count)
    found |= answer.outputs
    if answer.noise:
        found["noise"] = np.array(answer.noise)
    if answer.seed is not None:
        found["seed"] = np.full(count, answer.seed)
    return found


def check_columns(table: Columns, out: Path) -> None:
    """Check that a table holds such columns.

    Raises:
        InvalidRequest: It does not; the message names one that does.
    """
    arrays = [name for name in table if name not in ABOUT]
    deep = [name for name in arrays if table[name].ndim > 1]
    if out.suffix.lower() == ".npy" and len(arrays) > 1:
        raise InvalidRequest(f"{out.name} holds one array, and there are {', '.join(arrays)}; use .npz or .parquet")
    if out.suffix.lower() == ".csv" and deep:
        raise InvalidRequest(f"{', '.join(deep)} are arrays, which {out.name} does not hold; use .npz or .parquet")


def write_part(path: Path, part: Columns) -> None:
    """Write the rows of one item."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **part)
    write(path, file.getvalue())


def join(parts: Sequence[Path], about: Mapping[str, str], out: Path) -> None:
    """Write the table.

    Args:
        parts: Its parts, in order.
        about: Name, version and fingerprint of the model, which .npz and Parquet hold too.
        out: The table; its ending says of what kind it is.

    Raises:
        InvalidRequest: Their arrays do not go together.
    """
    rows: dict[str, list[NDArray[Any]]] = {}
    loaded = [_loaded(part) for part in parts]
    names = dict.fromkeys(name for part in loaded for name in part)
    for part in loaded:
        count = len(part["row"])
        for name in names:
            known = part.get(name, np.full(count, "" if name in ("path", "noise") else np.nan))
            rows.setdefault(name, []).append(known)
    try:
        table = {name: np.concatenate(arrays) for name, arrays in rows.items()}
    except ValueError as error:
        raise InvalidRequest(f"the images are of several sizes, and no table holds their answers; {error}") from error
    WRITERS[out.suffix.lower()](table, about, out)


def _loaded(path: Path) -> Columns:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _write_npz(table: Columns, about: Mapping[str, str], out: Path) -> None:
    with replacing(out) as unfinished, unfinished.open("wb") as file:
        np.savez(file, allow_pickle=False, **table, **{name: np.array(value) for name, value in about.items()})


def _write_npy(table: Columns, _about: Mapping[str, str], out: Path) -> None:
    (array,) = (array for name, array in table.items() if name not in ABOUT)
    with replacing(out) as unfinished, unfinished.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _write_csv(table: Columns, _about: Mapping[str, str], out: Path) -> None:
    with replacing(out) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*(array.tolist() for array in table.values()), strict=True))


def _write_parquet(table: Columns, about: Mapping[str, str], out: Path) -> None:
    """Arrays are lists of numbers; the metadata of a column has the shape of each, those of the table the model."""
    pa, parquet = _pyarrow()
    arrays, fields = [], []
    for name, array in table.items():
        flat = pa.array(array.ravel())
        if array.ndim > 1:
            flat = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(array.shape[1:])))
        shape = {"shape": json.dumps(array.shape[1:])} if array.ndim > 1 else None
        arrays.append(flat)
        fields.append(pa.field(name, flat.type, metadata=shape))
    with replacing(out) as unfinished:
        parquet.write_table(pa.table(arrays, schema=pa.schema(fields, metadata=dict(about))), unfinished)


WRITERS: Mapping[str, Any] = {
    ".npz": _write_npz,
    ".npy": _write_npy,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
"""Writers by ending."""
