"""A bulk run: plans the parts of a source, has them computed, and reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from tqdm import tqdm

from service.api.validation import options_of
from service.bulk import processes
from service.bulk.files import Folder
from service.bulk.operator import Job, Operator, Outcome, operations, rows_of_part, trial, version_folder
from service.bulk.source import Source, Task, find
from service.bulk.target import Failure, Form, begin, check_pictures, continued, write_errors
from service.errors import InferenceFailed, InvalidOption, StartError, quoted
from service.operations.inference.latent import BLOCK_ROWS, fresh_seed
from service.operations.operation import MEANS, Operation
from service.settings import Settings

Pool = Callable[[Job, Sequence[Task], int | None], Generator[Outcome]]
"""(job, tasks, processes or actors) -> outcomes, as they are ready."""


class Request(NamedTuple):
    """What is asked of a run.

    Attributes:
        operation: Name of the operation.
        source: A folder, a glob, a file, or a URL of one of these.
        target: The folder of the results, or its URL.
        options: Options of the operation.
        model: Name of the model; empty is the default one of the operation.
        version: Its version; empty is the latest.
        form: What is written; None is pictures where the answer is images alone, else Parquet.
        rows: Rows of a part; None is as many as go well into memory.
        column: Column of the images in tables; empty takes the only one that may hold them.
        source_options: Options of the source's file system, as fsspec takes them.
        target_options: Options of the target's.
    """

    operation: str
    source: str
    target: str
    options: Mapping[str, Any] = MappingProxyType({})
    model: str = ""
    version: str = ""
    form: Form | None = None
    rows: int | None = None
    column: str = ""
    source_options: Mapping[str, Any] = MappingProxyType({})
    target_options: Mapping[str, Any] = MappingProxyType({})


class Plan(NamedTuple):
    """What a run does.

    Attributes:
        job: What every process receives.
        record: What is written of the run.
        tasks: The tasks, in the order of the rows.
        rows: Rows of the source; None of shards, whose rows are not counted.
        report: What is known at the beginning.
    """

    job: Job
    record: dict[str, Any]
    tasks: list[Task]
    rows: int | None
    report: Report


@dataclass
class Report:
    """What came of a run.

    Attributes:
        target: Where the results are.
        model: The model that computed.
        version: Its version.
        fingerprint: Its fingerprint.
        seed: Seed of the run; None where the operation draws nothing.
        ignored: Files of the source whose endings are not those of images.
        done: Rows computed in this run.
        before: Rows whose results an earlier run had written.
        failed: Rows without results.
        start_s: Seconds until the first process began to compute.
        busy_s: Seconds from then until the last part was done.
        processor_s: Seconds of a core that all tasks took together.
    """

    target: str
    model: str
    version: str
    fingerprint: str
    seed: int | None
    ignored: int
    done: int = 0
    before: int = 0
    failed: list[Failure] = field(default_factory=list)
    start_s: float = 0.0
    busy_s: float = 0.0
    processor_s: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count what came of a task."""
        self.done, self.before = self.done + outcome.done, self.before + outcome.before
        self.failed += outcome.failed
        self.processor_s += outcome.processor_s


def run(
    settings: Settings,
    request: Request,
    *,
    workers: int | None = None,
    pool: Pool = processes.run,
    progress: bool | None = None,
) -> Report:
    """Run an operation on many images. The same call goes on where an earlier one ended.

    Args:
        settings: Of the service: where the models are, and limits.
        request: What is asked.
        workers: Processes, or actors of Ray; None is one a core.
        pool: Runs the tasks.
        progress: Whether to show a progress bar; None shows it on a terminal.

    Raises:
        ServiceError: The run cannot begin or go on; the message names the fix.
        OSError: A table or a shard cannot be read, or the results cannot be written.
    """
    began = time.monotonic()
    job, record, tasks, rows, report = planned(settings, request)
    into = Folder(job.target, job.target_options)
    job = job._replace(shared=workers != 1)  # after the check of the plan, which reads the first rows alone
    missing = len(tasks)
    bar = tqdm(total=rows, desc=job.operation, unit="row", disable=None if progress is None else not progress)
    with into.locked():
        begin(into, record, rows)
        try:
            with bar, closing(pool(job, tasks, workers)) as outcomes:
                for outcome in outcomes:
                    report.start_s = report.start_s or time.monotonic() - outcome.since_s - began
                    report.busy_s = time.monotonic() - began - report.start_s
                    report.add(outcome)
                    missing -= 1
                    bar.update(outcome.done + outcome.before + len(outcome.failed))
                    bar.set_postfix(failed=len(report.failed), refresh=False)
        finally:
            write_errors(into, report.failed)
    if missing:
        raise InferenceFailed(f"{missing} of {len(tasks)} parts have no results; run the same command again")
    return report


def planned(settings: Settings, request: Request) -> Plan:
    """Check a request; nothing is written.

    Raises:
        ServiceError: The run cannot begin; the message names the fix.
    """
    name, column = request.operation, request.column
    if name not in operations():
        raise InvalidOption(f"a bulk run does {', '.join(operations())}, not {quoted(name)}")
    operation, into = operations()[name], Folder(request.target, request.target_options)
    found = find(request.source, request.source_options, into.root)
    options = options_of(operation, request.options, settings.max_draws)
    form = request.form or _form(operation, options)
    if form == "images" and found.kind != "parquet":
        check_pictures(found.names)
    folder = version_folder(settings, name, request.model, request.version)
    job = Job(
        settings, name, options.model_dump(mode="json", exclude_defaults=True), folder.parent.name, folder.name,
        trial(settings, folder), found.url, found.kind, dict(request.source_options), column, into.absolute,
        dict(request.target_options), form, request.rows or BLOCK_ROWS,
    )  # fmt: skip
    with closing(Operator(job)) as operator:
        manifest = operator.model.manifest
        record = continued(
            into,
            {
                "operation": name,
                "options": {option: value for option, value in job.options.items() if option != "seed"},
                "seed": job.options.get("seed"),
                "model": manifest.name,
                "version": manifest.version,
                "fingerprint": manifest.fingerprint,
                "form": form,
                "source": found.url,
                "kind": found.kind,
                "column": column,
                "rows": request.rows or rows_of_part(operator.model, options),
            },
        )
        if "seed" in operation.options.model_fields:
            record["seed"] = fresh_seed() if record["seed"] is None else record["seed"]
            job = job._replace(options={**job.options, "seed": record["seed"]})
        job = job._replace(rows=record["rows"])
        tasks = Source(Folder(found.url, request.source_options), found.kind, job.rows, column).tasks(found.names)
        if not tasks:
            raise StartError(f"{request.source} holds no rows")
        operator.check(tasks[0])
    rows = None if found.kind == "tar" else sum(task.rows or 0 for task in tasks)
    report = Report(
        request.target, manifest.name, manifest.version, manifest.fingerprint, record["seed"], found.ignored
    )
    return Plan(job, record, tasks, rows, report)


def _form(operation: Operation, options: Any) -> Form:
    """Pictures where the answer is images alone, else Parquet."""
    gives_images = MEANS.name in [tensor.name for tensor in operation.outputs]
    return "images" if gives_images and options.images_alone else "parquet"
