"""Tasks on Ray: the operator of `operator.py` on a pool of Ray Data's actors, which replaces those that die."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import warnings
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from service.bulk.operator import Job, Operator, Outcome
from service.bulk.source import Task
from service.bulk.target import Failure
from service.contract.cores import cpu_count
from service.errors import ServiceError, StartError, one_line

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
try:
    import ray  # after the line above
    from ray import data
    from ray.exceptions import RayError
except ImportError as error:
    raise StartError(
        f"--ray needs Ray ({one_line(error)}); install the extra: pip install '.[ray]' in the project's folder"
    ) from error

RETRIES = 2
"""How often a task is done again whose actor has died."""
BLOCKS = 8
"""Runs of consecutive parts of tables that an actor does: longer ones decode less twice, shorter ones end together."""
REACH_S = 10.0
"""Time in which the address of a cluster must answer."""


class Actor:
    """The operator in an actor: batches of tasks in JSON become batches of outcomes.

    Args:
        job: What is to be done.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._operator: Operator | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Work off tasks. The driver raises an error that they meet; Ray would do them again."""
        found: list[Any] = []
        try:
            self._operator = self._operator or Operator(self._job)
            began = time.monotonic()
            for name, paths, first, start, rows in map(json.loads, batch["task"]):
                found.append(self._operator(Task(name, tuple(paths), first, start, rows)))
            # All are handed over now, so the first one began at the beginning.
            found[0] = found[0]._replace(since_s=time.monotonic() - began)
        except (ServiceError, OSError) as error:
            found.append({"error": str(error)})
        return {"outcome": np.array([json.dumps(one) for one in found])}


class Cluster:
    """A pool of actors on a Ray cluster.

    Args:
        address: Of a cluster, `auto` for the one that runs on this machine, or `local` for one that ends with the run.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def __call__(self, job: Job, tasks: Sequence[Task], count: int | None) -> Generator[Outcome]:
        """Work off tasks; see `processes.run`. `count` None is an actor a core of the cluster.

        Raises:
            StartError: There is no such cluster, or an actor cannot go on.
        """
        # Options of actors have no other way before Ray 2.61, which the extra's bound keeps out.
        warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of its plans and files
        self._connect(count or cpu_count())
        try:
            actors = min(count or int(ray.cluster_resources().get("CPU", 1)), len(tasks))
            context = data.DataContext.get_current()
            context.enable_progress_bars = False
            rows = [{"task": json.dumps(task)} for task in tasks]
            blocks = min(len(rows), BLOCKS * actors if job.kind == "parquet" else len(rows))
            found = data.from_items(rows, override_num_blocks=blocks).map_batches(
                Actor, fn_constructor_args=(job,), batch_size=None, compute=data.ActorPoolStrategy(size=actors),
                num_cpus=1, ray_remote_args_fn=_retries,
            )  # fmt: skip
            for row in found.iter_rows():
                yield _outcome(json.loads(row["outcome"]))
        except RayError as error:
            raise StartError(
                f"Ray cannot go on: {one_line(error)}; the same command goes on from here, with more memory or fewer "
                "actors (--workers) if actors were killed"
            ) from error
        finally:
            ray.shutdown()

    def _connect(self, cores: int) -> None:
        """Connect to the cluster, or start one that listens on the loopback interface of this machine alone.

        Raises:
            StartError: There is none.
        """
        here = {"num_cpus": cores, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        further = here if self._address == "local" else {}
        host, colon, port = self._address.rpartition(":")
        try:
            if colon and port.isdigit() and "://" not in host:  # Ray itself would ask for minutes
                socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
            ray.init(self._address, log_to_driver=False, logging_level="WARNING", **further)
        except (OSError, RayError, ValueError) as error:
            raise StartError(
                f"no Ray cluster at {self._address}: {one_line(error)}; start one with `ray start --head`, or say "
                "--ray local"
            ) from error


def _retries() -> dict[str, Any]:
    """Options of each actor: Ray would do a task again for ever that ends every actor."""
    return {"max_task_retries": RETRIES}


def _outcome(found: Any) -> Outcome:
    """An outcome from JSON.

    Raises:
        StartError: It is an error.
    """
    if isinstance(found, dict):
        raise StartError(found["error"])
    outcome = Outcome(*found)
    return outcome._replace(failed=[Failure(*one) for one in outcome.failed])
