"""A row group that the processes of a run share: the first one decodes it into a file, which all of them read."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from service.bulk.files import DRAFTS, Folder


class SharedArrays:
    """Arrays of one type in a local file, which is removed when no process reads it any more.

    The first process writes them, under a lock; others wait for it, and read its file. Where it dies, the next one
    writes.

    Args:
        folder: The folder of the results, on this machine.
        name: Name of the arrays.
        arrays: The arrays.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, folder: Folder, name: str, arrays: Iterable[pa.Array]) -> None:
        file = f"{DRAFTS}/{name}.arrow"
        self._path = Path(folder.path(file))
        while True:
            with suppress(FileNotFoundError):
                self._file = pa.OSFile(str(self._path))
                break
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.with_suffix(".lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not self._path.exists():
                    _write(folder, file, arrays)
        fcntl.flock(self._file.fileno(), fcntl.LOCK_SH)
        self._reader = pa.ipc.open_file(self._file)

    def __getitem__(self, place: int) -> pa.Array:
        return self._reader.get_batch(place).column(0)

    def close(self) -> None:
        """Read no more. The last process removes the file; one that comes later writes it again."""
        with suppress(BlockingIOError):
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._path.unlink(missing_ok=True)
        self._file.close()


def _write(folder: Folder, file: str, arrays: Iterable[pa.Array]) -> None:
    batches = (pa.record_batch([array], ["values"]) for array in arrays)
    first = next(batches)
    with folder.written(file) as opened, pa.ipc.new_file(opened, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
