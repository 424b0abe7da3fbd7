"""`python -m service.repository.trial`: reads, checks, opens, replays and times a version in a confined process.

A graph may loop for ever, take all memory or crash onnxruntime, even while it is opened. So the serving process opens
a version only after it has passed here.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

from service import process
from service.contract.manifest import Graph
from service.errors import StartError, one_line
from service.repository.graph_check import check_graph
from service.repository.progress import Tell, tell_nobody
from service.repository.version import Trial, Version, assemble, open_version, start_errors
from service.repository.warm_up import warm
from service.runtime.session import PROVIDERS

WRITING = threading.Lock()


def main(arguments: list[str]) -> int:
    """Try a version, and write its steps to standard output, each on a line; the last line is the outcome in JSON.

    Args:
        arguments: Process id of the parent, and a `Trial` in JSON.
    """
    parent, asked = int(arguments[0]), Trial(*json.loads(arguments[1]))
    process.end_with_parent(parent)
    process.disable_core_dumps()
    process.fix_mmap_threshold()
    try:
        outcome = run(asked, write_step)
    except MemoryError:
        outcome = {
            "refused": f"{asked.folder} needs more memory than the {asked.memory_bytes} bytes of "
            "VAE_LOAD_MEMORY_BYTES, or than is free"
        }
    except Exception as error:  # noqa: BLE001  # a hostile file may cause any error
        known = isinstance(error, StartError)
        outcome = {
            "refused": one_line(error if known else f"{asked.folder} cannot be opened: {type(error).__name__}: {error}")
        }
    WRITING.acquire()  # for good: a thread that still opens a graph writes nothing after the outcome
    sys.stdout.write(json.dumps(outcome))
    return 0


def write_step(step: str) -> None:
    """Write a step to standard output, for the parent."""
    with WRITING:
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()


def run(asked: Trial, tell: Tell = tell_nobody) -> dict[str, Any]:
    """Return the manifest's digest, and the timings of the programs as pairs of rows and seconds.

    Raises:
        StartError: The version cannot be served.
        MemoryError: There is too little memory.
    """
    process.limit_memory(asked.memory_bytes)
    tell("reading")
    with open_version(Path(asked.folder), asked.public_keys) as version:
        graphs = [graph for view in version.variants for graph in view.graphs.values()]
        for graph in graphs:
            _check(version, graph)
        process.limit_memory(asked.memory_bytes, asked.threads * len(graphs))
        process.forbid_files()
        # On the CPU in any case: other providers need files, and reserve more address space than they use.
        model = assemble(version, PROVIDERS["cpu"], asked.threads, tell)
    tell("warming up")
    timings = warm(model, version.golden, asked.max_rows) if asked.timed else []
    return {"digest": version.digest, "timings": [list(timing.items()) for timing in timings]}


def _check(version: Version, graph: Graph) -> None:
    with start_errors():
        content = version.files.read(graph)
    data = {entry.file: version.files.size(entry) for entry in graph.data}
    with start_errors(f"{version.folder} cannot be opened: "):
        check_graph(graph.file, content, data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
