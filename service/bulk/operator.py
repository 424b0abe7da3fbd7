"""The operator of a bulk run: opens one version of a model, and works off one task after the other."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.api.memory import answer_bytes
from service.api.validation import admit, intake_of, options_of, variant_of
from service.bulk.files import Folder
from service.bulk.source import Block, Kind, Source, Task, Value
from service.bulk.target import Failure, Form, PartRecord, Row, Target
from service.codecs import npy
from service.codecs.image import read as read_picture
from service.codecs.payload import Meter, Payload, scaled
from service.codecs.source import Source as Kept
from service.contract.manifest import digest
from service.errors import (
    InvalidOption,
    InvalidShape,
    ServiceError,
    StartError,
    Unreadable,
    UnsupportedOperation,
    one_line,
    quoted,
)
from service.operations.inference.latent import BLOCK_ROWS
from service.operations.inference.vae import Result
from service.operations.operation import Inputs, Operation
from service.operations.registry import OPERATIONS
from service.repository.defaults import default_models, is_visible, model_names
from service.repository.remote import local_copy
from service.repository.selection import Selection, version_key
from service.repository.version import LoadRules, Tried, open_tried, read_manifest, tried
from service.runtime.model import Model
from service.runtime.scheduler import Engine
from service.runtime.session import execution_provider
from service.settings import Settings

BATCH_BYTES, PART_BYTES = 2**26, 2**28
"""Estimated memory of computing one batch, and of the answers of a part."""
MOST_ROWS = 1024
"""Rows of a batch and of a part at most."""
OF_RUN = (InvalidOption, UnsupportedOperation, StartError)
"""Errors that every other row meets too."""
OF_REQUEST = {"uncertainty": "map"}
"""Values of options that make one figure of all rows of a request, which the rows of a run are not."""


class Job(NamedTuple):
    """The work of a run, as every process receives it.

    Attributes:
        settings: Of the service, with the folder of the models.
        operation: Name of the operation.
        options: Its options, the seed among them, as JSON values.
        model: Name of the model.
        version: Its version.
        tried: What its trial has found; other files under that name are refused.
        source: Folder of the files that are read.
        kind: Their kind.
        source_options: Options of its file system.
        column: Column of the images in tables.
        target: Where the results go.
        target_options: Options of its file system.
        form: What is written.
        rows: Rows of a part.
        shared: Whether several processes work, which share large row groups if the results are on this machine.
    """

    settings: Settings
    operation: str
    options: Mapping[str, Any]
    model: str
    version: str
    tried: Tried
    source: str
    kind: Kind
    source_options: dict[str, Any]
    column: str
    target: str
    target_options: dict[str, Any]
    form: Form
    rows: int
    shared: bool = False


class Outcome(NamedTuple):
    """What came of a task.

    Attributes:
        task: Its name.
        done: Rows that were computed.
        before: Rows whose results an earlier run had written.
        failed: Rows without results.
        since_s: Seconds since it began, when this is handed over.
        processor_s: Seconds of a core that it took.
    """

    task: str
    done: int
    before: int
    failed: list[Failure]
    since_s: float
    processor_s: float


class Batch(NamedTuple):
    """Rows that are computed together.

    Attributes:
        rows: Consecutive rows.
        model: The variant of the model.
        inputs: Their inputs.
        kept: What a picture of each keeps; None of numbers.
    """

    rows: Sequence[Row]
    model: Model
    inputs: Inputs
    kept: Sequence[Kept | None]

    def part(self, start: int, stop: int) -> Batch:
        """The rows from `start` to `stop`."""
        inputs = self.inputs.part(start, stop - start)
        return self._replace(rows=self.rows[start:stop], inputs=inputs, kept=self.kept[start:stop])

    def goes_on_with(self, other: Batch) -> bool:
        """Whether the rows of another batch follow, and can be computed with these."""
        mine, its = self.inputs, other.inputs
        return (
            self.model is other.model
            and self.rows[-1].place + 1 == other.rows[0].place
            and mine.tiling is None is its.tiling
            and (mine.rows.shape[1:], mine.rows.dtype, mine.size) == (its.rows.shape[1:], its.rows.dtype, its.size)
        )


def operations() -> dict[str, Operation]:
    """The operations of a run, by name: those that make of each image something of its own."""
    return {one.name: one for one in OPERATIONS if one.row_wise and one.takes == "images" and not one.masked}


def version_folder(settings: Settings, operation: str, model: str, version: str) -> Path:
    """The folder of one version of a model.

    Args:
        settings: Of the service.
        operation: The operation whose default model is meant.
        model: Name of the model; empty is the default one.
        version: Its version; empty is the latest.

    Raises:
        StartError: There is none.
    """
    folder = local_copy(settings)
    known = model_names(folder)
    if not known:
        raise StartError(f"{folder} holds no models; name the model repository with --models or VAE_MODELS")
    name = model or default_models(folder, Selection(), settings.default_model).of(operation)
    if name not in known:
        raise StartError(f"no model {quoted(name)} in {folder}; name one of {', '.join(known)} with --model")
    versions = sorted((path.name for path in (folder / name).glob("*/") if is_visible(path)), key=version_key)
    if version and version not in versions:
        raise StartError(f"model {name} has no version {quoted(version)}; its folder holds {', '.join(versions)}")
    return folder / name / (version or versions[-1])


def trial(settings: Settings, folder: Path) -> Tried:
    """Try a version, as the service does before it serves it; once for several runs of a process.

    Raises:
        StartError: It cannot be used.
    """
    rules = LoadRules(settings.load_limit_s, settings.load_memory_bytes, settings.model_public_keys)
    provider = execution_provider(settings.execution_provider)
    text, _ = read_manifest(folder, rules.public_keys)
    return _trial(folder, digest(text), provider, settings.threads or 1, settings.max_rows, rules)


@lru_cache
def _trial(folder: Path, _digest: str, provider: str, threads: int, max_rows: int, rules: LoadRules) -> Tried:
    """Try a version whose manifest has a digest; it covers all of its files."""
    return tried(folder, provider, threads, max_rows, rules)


def rows_of_part(model: Model, options: Any) -> int:
    """Rows of a part: a multiple of the rows that are drawn together, whose answers fit into memory."""
    return max(BLOCK_ROWS, min(MOST_ROWS, PART_BYTES // _row_bytes(model, options)) // BLOCK_ROWS * BLOCK_ROWS)


def _row_bytes(model: Model, options: Any, size: tuple[int, int] | None = None) -> int:
    if size is None and model.free is not None:
        return PART_BYTES // BLOCK_ROWS
    return max(1, answer_bytes(model, options, 1, size))


class Operator:
    """Computes tasks. Each process has one.

    Args:
        job: What is to be done.

    Raises:
        StartError: The model cannot be opened here, or is another one.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.settings = job, job.settings
        self.operation = operations()[job.operation]
        self.options = options_of(self.operation, job.options, self.settings.max_draws)
        folder = version_folder(self.settings, job.operation, job.model, job.version)
        provider, threads = execution_provider(self.settings.execution_provider), self.settings.threads or 1
        self.model = open_tried(folder, provider, threads, self.settings.max_rows, job.tried)
        for variant in self.model.variants.values():
            for program in variant.programs.values():
                program.timing = None  # throughput counts here, not latency: every batch has `max_rows`
        self._served = {job.model: {job.version: self.model}}
        about = {
            "model": job.model, "version": job.version, "fingerprint": self.model.manifest.fingerprint,
            "operation": job.operation,
            "options": self.options.model_dump_json(exclude_defaults=True),
        }  # fmt: skip
        fixed = self.model.free is None and not self.model.others and self.options.resizing != "tile"
        into, source = Folder(job.target, job.target_options), Folder(job.source, job.source_options)
        self.source = Source(source, job.kind, job.rows, job.column, into if job.shared and into.local else None)
        self.target = Target(into, job.form, about, fixed=fixed, keyed=job.kind == "tar")
        self._engine = Engine(
            max_rows=self.settings.max_rows, queue_rows=sys.maxsize, inline_s=math.inf,
            tile_pixels=self.settings.tile_pixels,
        )  # fmt: skip
        # No `asyncio.Runner`: on Python 3.11 each of its runs prints the result into an error that it drops.
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        """End its engine and its event loop, and close its table."""
        self._loop.run_until_complete(self._engine.close())
        self._loop.close()
        self.source.close()

    def check(self, task: Task) -> None:
        """Check the options, and that some of the first images can be computed.

        Args:
            task: The first task.

        Raises:
            ServiceError: The model cannot do what the options ask, or none of the first images can be used.
        """
        self.operation.check_offered(self.model, self._served, self.options)
        for name, value in OF_REQUEST.items():
            if getattr(self.options, name, None) == value:
                raise InvalidOption(f"{name}={value} is of all rows of a request; use {name}=true")
        block = next(self.source.read(task), None)
        if block is None:
            return
        if isinstance(block.values, np.ndarray) and block.values.dtype == np.uint8 and block.values.max(initial=0) == 1:
            raise InvalidOption(
                "the images in uint8 are levels of 0 to 255, but their highest is 1; store black and white as bool, or "
                "as 0 and 255"
            )
        failed = []
        for found in self._admitted(block):
            if not isinstance(found, Failure):
                list(self._computed(iter([found.part(0, 1) if len(found.rows) > 1 else found])))
                return
            failed.append(found)
        raise InvalidShape(f"none of the first {len(failed)} images can be used: {failed[0].path}: {failed[0].error}")

    def __call__(self, task: Task) -> Outcome:
        """Compute what is missing of a task.

        Raises:
            OSError: A table or a shard cannot be read, or the results cannot be written.
            ServiceError: No row can be computed.
        """
        began, used = time.monotonic(), time.process_time()
        before, written, changed = list[PartRecord](), list[PartRecord](), set[str]()
        for part, blocks in self._parts(task):
            record = self.target.record_of(part)
            if record is None:
                written.append(self._write_part(part, blocks))
            elif record.content == _content(blocks) and self.target.is_whole(record):
                before.append(record)
            else:
                changed.add(part)  # its blocks have been read: a second pass computes it
        if changed:
            written += [self._write_part(part, blocks) for part, blocks in self._parts(task) if part in changed]
        if self.job.kind == "tar":  # samples have been taken out of the shard
            self.target.remove_from(task.name, len(before) + len(written))
        failed = [failure for record in before + written for failure in record.failed]
        done, earlier = (sum(record.rows for record in records) for records in (written, before))
        return Outcome(task.name, done, earlier, failed, time.monotonic() - began, time.process_time() - used)

    def _parts(self, task: Task) -> Iterator[tuple[str, Iterator[Block]]]:
        """The parts of a task, by name, with their blocks."""
        return groupby(self.source.read(task), lambda block: block.part)

    def _write_part(self, part: str, blocks: Iterator[Block]) -> PartRecord:
        """Compute a part, and write its results and then its record."""
        content, failed, count = sha256(), list[Failure](), 0

        def admitted() -> Iterator[Batch | Failure]:
            for block in blocks:
                _update(content, block)
                yield from self._admitted(block)

        with self.target.writer(part) as writer:
            for found in self._computed(self._batches(admitted())):
                if isinstance(found, Failure):
                    failed.append(found)
                    writer.leave_out(found)
                else:
                    batch, result = found
                    writer.add(batch.rows, result, batch.kept)
                    count += len(batch.rows)
        record = PartRecord(content.hexdigest(), writer.outputs, count, failed)
        self.target.keep_record(part, record)
        return record

    def _admitted(self, block: Block) -> Iterator[Batch | Failure]:
        """The rows of a block that can be computed, and why others cannot."""
        keys = block.keys or [""] * len(block.paths)
        count = len(block.paths)
        places, numbers = range(block.first, block.first + count), range(block.row, block.row + count)
        rows = list(map(Row, places, numbers, block.paths, keys))
        if isinstance(block.values, np.ndarray):
            with suppress(ServiceError):  # of one row or more: each is tried by itself
                yield self._batch(rows, Payload(self._shaped(block.values)))
                return
        for row, value in zip(rows, block.values, strict=True):
            try:
                yield self._batch([row], self._payload(value))
            except OF_RUN:
                raise
            except ServiceError as error:
                yield _failure(row, error)

    def _payload(self, value: Value) -> Payload:
        """The array of one image.

        Raises:
            ServiceError: It has none.
        """
        if isinstance(value, ServiceError):
            raise value
        if isinstance(value, np.ndarray):
            return Payload(self._shaped(value))
        meter = Meter(self.settings.max_pixels)
        intake = intake_of(self.operation, self.model, self.options, meter, self.settings.tile_pixels)
        read = npy.read if value.startswith(npy.MAGIC) else read_picture
        try:
            payload = read(value, "", intake)
        except (ServiceError, MemoryError):
            raise
        except Exception as error:  # a bug of a reader: it ends no run
            raise Unreadable(f"the file cannot be read: {one_line(error)}") from error
        return scaled(payload, self.options.scaling, meter)

    def _shaped(self, values: NDArray[Any]) -> NDArray[Any]:
        """Numbers of a table: levels of 8 bits as parts of white, flat images in the shape of the model's."""
        if values.dtype == np.uint8:
            values = np.divide(values, np.float32(255.0), dtype=np.float32)
        shape = self.model.input_shape
        flat = values.shape[-1:] == (math.prod(shape),) and values.ndim < 3
        return values.reshape(*values.shape[:-1], *shape) if flat else values

    def _batch(self, rows: Sequence[Row], payload: Payload) -> Batch:
        """Check rows, and bring them to the model.

        Raises:
            ServiceError: They cannot be computed.
        """
        model = variant_of(self.operation, self.model, payload, self.options)
        self.operation.check_offered(model, self._served, self.options)
        large = None if model.free is None else self.settings.tile_pixels
        inputs = admit(self.operation, model, payload, self.options, sys.maxsize, lambda *_: None, large)
        images = inputs.tiling.images if inputs.tiling else len(inputs.rows)
        if images != len(rows):
            raise InvalidShape(f"the file holds {images} images; a run takes one a file, so split it")
        if self.operation.check is not None:
            self.operation.check(model, inputs, self.options)
        kept = payload.source
        if kept is not None and self.options.resizing in ("pad", "crop"):
            kept = kept._replace(how=self.options.resizing)
        return Batch(rows, model, inputs, [kept] * len(rows))

    def _batches(self, admitted: Iterator[Batch | Failure]) -> Iterator[Batch | Failure]:
        """Consecutive rows of one shape together, and no more than fit into memory."""
        waiting: list[Batch] = []
        for found in admitted:
            if isinstance(found, Failure):
                yield found
                continue
            limit = self._batch_rows(found)
            if waiting and not (waiting[-1].goes_on_with(found) and len(waiting) < limit):
                yield _joined(waiting)
                waiting = []
            if len(found.rows) == 1:
                waiting.append(found)
            else:
                yield from (found.part(at, at + limit) for at in range(0, len(found.rows), limit))
        if waiting:
            yield _joined(waiting)

    def _batch_rows(self, batch: Batch) -> int:
        """Rows of a batch of such images at most."""
        size = None if batch.model.free is None else batch.inputs.rows.shape[-2:]
        return max(1, min(MOST_ROWS, BATCH_BYTES // _row_bytes(batch.model, self.options, size)))

    def _computed(self, batches: Iterator[Batch | Failure]) -> Iterator[tuple[Batch, Result] | Failure]:
        """The results of batches. Where one fails, each of its rows is tried by itself."""
        for batch in batches:
            if isinstance(batch, Failure):
                yield batch
                continue
            inputs = batch.inputs._replace(first=batch.rows[0].place)
            try:
                result = self._loop.run_until_complete(
                    self.operation.perform(batch.model, self._engine.submit, inputs, self.options)
                )
            except OF_RUN:
                raise
            except ServiceError as error:
                if len(batch.rows) == 1:
                    yield _failure(batch.rows[0], error)
                else:
                    yield from self._computed(batch.part(k, k + 1) for k in range(len(batch.rows)))
            else:
                yield batch, result


def _joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one row each as one."""
    if len(batches) == 1:
        return batches[0]
    inputs = batches[0].inputs._replace(rows=np.concatenate([batch.inputs.rows for batch in batches]))
    rows, kept = ([one for batch in batches for one in getattr(batch, name)] for name in ("rows", "kept"))
    return batches[0]._replace(rows=rows, inputs=inputs, kept=kept)


def _failure(row: Row, error: ServiceError) -> Failure:
    return Failure(*row, error.code, str(error))


def _content(blocks: Iterator[Block]) -> str:
    """The digest of the blocks of a part."""
    content = sha256()
    for block in blocks:
        _update(content, block)
    return content.hexdigest()


def _update(content: Any, block: Block) -> None:
    """Add the rows of a block to the digest of a part: their names, and what was read."""
    content.update("\n".join((*block.paths, *block.keys, "")).encode())
    for value in [block.values] if isinstance(block.values, np.ndarray) else block.values:
        if isinstance(value, np.ndarray):
            content.update(f"{value.dtype}{value.shape}\n".encode())
            content.update(np.ascontiguousarray(value).data)
        else:
            content.update(value if isinstance(value, bytes) else str(value).encode())
