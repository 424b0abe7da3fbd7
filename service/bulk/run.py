"""A bulk run: from its source and options to its results, and what is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from service.api.validation import options_of
from service.bulk import processes
from service.bulk.files import Folder
from service.bulk.operator import Job, Operator, Outcome, opened, operations, rows_of_part
from service.bulk.source import Task, find
from service.bulk.target import PARTS, Failure, Form, begin, check_pictures, continued, write_errors
from service.contract.cores import cpu_count
from service.errors import InferenceFailed, InvalidOption, StartError, quoted
from service.operations.inference.latent import fresh_seed
from service.operations.operation import MEANS, Operation
from service.settings import Settings

MODEL = ("model", "version", "fingerprint")
"""What names a model."""
Pool = Callable[[Job, Iterable[tuple[Task, bool]], int], Generator[Outcome]]
"""(job, tasks, number of processes or actors) -> outcomes, as they are ready."""


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
        busy_s: Seconds from then on.
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

    def add(self, outcome: Outcome) -> None:
        """Count what came of a task."""
        self.done, self.before = self.done + outcome.done, self.before + outcome.before
        self.failed += outcome.failed


def run(
    settings: Settings,
    operation: str,
    source: str,
    target: str,
    options: Mapping[str, Any] | None = None,
    *,
    model: str = "",
    version: str = "",
    form: Form | None = None,
    rows: int | None = None,
    column: str = "",
    source_options: dict[str, Any] | None = None,
    target_options: dict[str, Any] | None = None,
    workers: int | None = None,
    pool: Pool = processes.run,
    progress: bool | None = None,
) -> Report:
    """Run an operation on many images. The same call goes on where an earlier one ended.

    Args:
        settings: Of the service: where the models are, and limits.
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
        workers: Processes, or actors of Ray; None is one a core.
        pool: Runs the tasks.
        progress: Whether to show a progress bar; None shows it on a terminal.

    Raises:
        ServiceError: The run cannot begin or go on; the message names the fix.
    """
    began = time.monotonic()
    if operation not in operations():
        raise InvalidOption(f"a bulk run does {', '.join(operations())}, not {quoted(operation)}")
    into = Folder(target, target_options)
    found = find(source, source_options or {}, into.root)
    given = options_of(operations()[operation], options or {}, settings.max_draws)
    settings, repository = opened(settings, operation, model, version)
    chosen = repository.find(None, None)
    manifest = chosen.manifest
    form = form or _form(operations()[operation], given)
    record = {
        "operation": operation,
        "options": given.model_dump(mode="json", exclude_defaults=True, exclude={"seed"}),
        "seed": getattr(given, "seed", None),
        "model": manifest.name,
        "version": manifest.version,
        "fingerprint": manifest.fingerprint,
        "form": form,
        "kind": found.kind,
        "column": column,
        "rows": rows or rows_of_part(chosen, given),
    }
    record = continued(into, record)
    if record["seed"] is None and "seed" in type(given).model_fields:
        record["seed"] = fresh_seed()
    drawn = {} if record["seed"] is None else {"seed": record["seed"]}
    job = Job(
        settings,
        operation,
        {**record["options"], **drawn},
        *(record[name] for name in MODEL),
        found.url,
        found.kind,
        source_options or {},
        column,
        target,
        target_options or {},
        form,
        record["rows"],
    )
    operator = Operator(job, repository)
    tasks = operator.source.tasks(found.names)
    total = None if found.kind == "tar" else sum(task.rows or 0 for task in tasks)
    if not tasks:
        raise StartError(f"{source} holds no rows")
    operator.check(tasks[0])
    if form == "images" and found.kind == "pictures":
        check_pictures(found.names)
    begin(into, record, total)
    report = Report(target, *(record[name] for name in MODEL), drawn.get("seed"), found.ignored)
    known = {name.removesuffix(".json").partition("-")[0] for name in into.below(PARTS).names()}
    del operator, repository, chosen  # their memory is the processes'
    pairs, missing = [(task, task.name in known) for task in tasks], len(tasks)
    try:
        with (
            closing(pool(job, pairs, min(workers or cpu_count(), len(pairs)))) as outcomes,
            tqdm(total=total, desc=operation, unit="row", disable=None if progress is None else not progress) as bar,
        ):
            for outcome in outcomes:
                if not report.start_s:
                    report.start_s = time.monotonic() - outcome.busy_s - began
                report.add(outcome)
                missing -= 1
                bar.update(outcome.done + outcome.before + len(outcome.failed))
                bar.set_postfix(failed=len(report.failed), refresh=False)
    finally:
        report.busy_s = time.monotonic() - began - report.start_s
        write_errors(into, report.failed)
    if missing:
        raise InferenceFailed(f"{missing} of {len(tasks)} parts have no results; run the same command again")
    return report


def _form(operation: Operation, options: Any) -> Form:
    """Pictures where the answer is images alone, else Parquet."""
    return (
        "images" if MEANS.name in [tensor.name for tensor in operation.outputs] and options.images_alone else "parquet"
    )
