"""Reads columns of numbers from a CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from training.errors import DataError

MISSING = {"", ".", "?", "-", "na", "n/a", "nan", "null", "none"}
SEPARATORS = {";": "semicolons", "\t": "tabs"}


class Table(Mapping[str, Tensor]):
    """The columns of a CSV file by name, each a float64 tensor (rows,).

    The first line holds the names. A column is converted when it is first asked for, so columns that are not used may
    hold text.

    Raises:
        DataError: the file cannot be read, or its lines differ in length. From `table[name]`: there is no such
            column, or one of its values is missing or not a finite number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                self._read(file)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text; save it as CSV (UTF-8)") from error
        self._columns: dict[str, Tensor] = {}

    def _read(self, file: Iterator[str]) -> None:
        reader = csv.reader(file)
        try:
            rows = [(reader.line_num, row) for row in reader if any(value.strip() for value in row)]
        except csv.Error as error:
            raise DataError(f"{self.path}, line {reader.line_num}: {error}; save it as CSV anew") from error
        if len(rows) < 2:
            raise DataError(f"{self.path} needs a line of column names and at least one line of values")
        (_, header), *self._rows = rows
        self._names = [name.strip() for name in header]
        for separator, plural in SEPARATORS.items():
            if len(header) == 1 and separator in header[0]:
                raise DataError(f"{self.path} separates its columns by {plural}; save it with commas")
        if repeated := {name for name in self._names if name and self._names.count(name) > 1}:
            raise DataError(f"{self.path}, line 1: two columns are named {min(repeated)!r}; rename one")
        for line, row in self._rows:
            if len(row) != len(header):
                raise DataError(
                    f"{self.path}, line {line}: {len(row)} values for {len(header)} columns; "
                    "a value that contains a comma needs quotes"
                )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._columns:
            self._columns[name] = self._converted(name)
        return self._columns[name]

    def __contains__(self, name: object) -> bool:
        return bool(name) and name in self._names

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name)

    def __len__(self) -> int:
        return sum(map(bool, self._names))

    def _converted(self, name: str) -> Tensor:
        if name not in self._names:
            raise DataError(f"{self.path} has no column {name!r}; it has {', '.join(self)}")
        place = self._names.index(name)
        numbers = [(line, row[place].strip(), _number(row[place])) for line, row in self._rows]
        if bad := [(line, text) for line, text, number in numbers if not math.isfinite(number)]:
            line, text = bad[0]
            others = f" ({len(bad) - 1} more such lines)" if len(bad) > 1 else ""
            raise DataError(f"{self.path}, line {line}, column {name!r}: {_complaint(text)}{others}")
        return torch.tensor([number for _, _, number in numbers], dtype=torch.float64)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _complaint(text: str) -> str:
    if text.lower() in MISSING:
        return "the value is missing; fill it in or delete the line"
    return f"{text!r} is not a finite number; write it like 1234.5, or a category as 0, 1, 2"
