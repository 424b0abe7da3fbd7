"""Tasks on the processes of this machine. A process that dies is replaced, and its task done again."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Generator, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from service import process
from service.bulk.operator import Job, Operator, Outcome
from service.bulk.source import Task
from service.contract.cores import cpu_count
from service.errors import StartError

MOST_DEATHS = 3
"""Processes that one task may end."""


class Worker(NamedTuple):
    """A process, and this side of the pipe to it."""

    process: Any
    pipe: Connection


class Busy(NamedTuple):
    """A process that works, its tasks from the present one on, and how many processes that one has ended."""

    worker: Worker
    share: list[Task]
    deaths: int


def run(job: Job, tasks: Sequence[Task], count: int | None) -> Generator[Outcome]:
    """Work off tasks in processes, one at a time each; outcomes come as they are ready.

    Args:
        job: What is to be done.
        tasks: The tasks, in the order of the rows.
        count: Number of processes; None is one a core.

    Raises:
        StartError: A task has ended several processes.
        ServiceError: What a process raises.
        OSError: Likewise.
    """
    count = count or cpu_count()
    waiting, busy = runs(tasks, count), dict[Connection, Busy]()

    def give(worker: Worker, share: list[Task], deaths: int = 0) -> None:
        busy[worker.pipe] = Busy(worker, share, deaths)
        with suppress(OSError):  # it has died already, which is seen below
            worker.pipe.send(share[0])

    try:
        for share in islice(waiting, count):
            give(_started(job), share)
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker, share, deaths = busy.pop(pipe)
                try:
                    found = pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    if deaths + 1 == MOST_DEATHS:
                        raise _fatal(share[0], worker.process.exitcode) from None
                    give(_started(job), share, deaths + 1)
                    continue
                if isinstance(found, Exception):
                    raise found
                del share[0]
                share = share or next(waiting, [])
                if share:
                    give(worker, share)
                else:
                    worker.pipe.close()  # it ends
                yield found
    finally:
        for worker, _, _ in busy.values():
            worker.process.kill()
            worker.process.join()


def runs(tasks: Sequence[Task], count: int) -> Generator[list[Task]]:
    """Tasks in runs of consecutive ones, in order; the last runs are the shortest, so that all processes end together.

    A process reads each table forward only, and decodes what lies between its runs in one row group.
    Source: guided self-scheduling, C. Polychronopoulos and D. Kuck, IEEE Trans. Computers C-36 (1987) 1425-1439.
    """
    at = 0
    while at < len(tasks):
        size = max(1, (len(tasks) - at) // (2 * count))
        yield list(tasks[at : at + size])
        at += size


def _fatal(task: Task, status: int | None) -> StartError:
    how = f"by {signal.Signals(-status).name}" if status is not None and status < 0 else f"with exit status {status}"
    first = f"{task.paths[0]}{f' and {len(task.paths) - 1} more files' if len(task.paths) > 1 else ''}"
    return StartError(
        f"part {task.name} ({first}, from row {task.start}) has ended {MOST_DEATHS} processes, the last {how}; give "
        "the run more memory or fewer processes (--workers), or take the files out"
    )


def _started(job: Job) -> Worker:
    # A fresh interpreter: a forked one would have the threads of onnxruntime, and no loop of its own.
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    started = context.Process(target=_work, args=(job, its, os.getpid()), daemon=True)
    started.start()
    its.close()
    return Worker(started, ours)


def _work(job: Job, pipe: Connection, parent: int) -> None:
    """Open the model, then work off what comes through the pipe until it is closed."""
    process.end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    operator: Operator | None = None
    with suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            try:
                operator = operator or Operator(job)
                found: Any = operator(task)
            except Exception as error:  # noqa: BLE001  # the parent raises it
                found = error
            pipe.send(found)
