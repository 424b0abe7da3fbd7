"""Counts what one request passes: files and functions of `service/`, from the socket to the answer.

`python -m benchmarks.walk` prints the path of a warm encode of one image in JSON, indented by call depth.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import uvicorn

from benchmarks import bodies
from service.app import create_app
from service.observability.metrics import FLUSH_S
from service.repository.repository import Repository
from service.repository.selection import Selection
from service.server.worker import server_config
from service.settings import Settings

ROOT = Path(__file__).parents[1]
SERVICE = f"{ROOT / 'service'}/"
MODEL = "mnist-2d"
WARM_REQUESTS = 20
"""Requests before the one that is walked: caches are filled, and the batcher knows that the caller is alone."""
HIDDEN = ("<genexpr>", "<lambda>", "<listcomp>", "<dictcomp>", "<setcomp>")
"""Code without a name of its own; it counts with the function that holds it."""


class Step(NamedTuple):
    """A function at its first call: functions of `service/` around it, its file below `service/`, its name."""

    depth: int
    file: str
    function: str


def walked() -> tuple[int, int]:
    """Walk one request.

    Returns:
        How many files and how many functions of `service/` a warm encode of a small JSON body passes.
    """
    steps = walk()
    return len({step.file for step in steps}), len(steps)


def walk() -> list[Step]:
    """The functions of `service/` that a warm encode passes on a real connection, in the order of their first calls."""
    settings = Settings(access_log=False)
    selection = Selection(f"{MODEL}:latest")
    repository = Repository.open(ROOT / "models", MODEL, "CPUExecutionProvider", 1, settings.max_rows, selection)
    return asyncio.run(_walk(settings, repository))


async def _walk(settings: Settings, repository: Repository) -> list[Step]:
    app = create_app(settings, repository)
    config = server_config(settings, app, app.respond, host="127.0.0.1", port=0)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110  # uvicorn has no event for it
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = bodies.json("/v1/encode").ask(bodies.images(1)).wire()
    for _ in range(WARM_REQUESTS):
        await _ask(reader, writer, request)
    await asyncio.sleep(2 * FLUSH_S)  # so that the metrics' timer does not fire meanwhile
    profile = Profile()
    sys.setprofile(profile)
    try:
        await _ask(reader, writer, request)
    finally:
        sys.setprofile(None)
    writer.close()
    server.should_exit = True
    await serving
    return list(profile.steps.values())


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    """Send a request and read its whole answer, which must be a 200."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    (length,) = (int(line.split(b":")[1]) for line in head.splitlines() if line.startswith(b"content-length"))
    await reader.readexactly(length)


class Profile:
    """Notes every function of `service/` at its first call; for sys.setprofile."""

    def __init__(self) -> None:
        self.steps: dict[CodeType, Step] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """One event of the interpreter."""
        code = frame.f_code
        if event == "call" and code not in self.steps and _is_counted(code):
            depth = sum(_is_counted(around.f_code) for around in _around(frame))
            self.steps[code] = Step(depth, code.co_filename.removeprefix(SERVICE), code.co_qualname)


def _is_counted(code: CodeType) -> bool:
    return code.co_filename.startswith(SERVICE) and code.co_name not in HIDDEN


def _around(frame: FrameType) -> list[FrameType]:
    """The frames that led to this one."""
    found = []
    caller = frame.f_back
    while caller is not None:
        found.append(caller)
        caller = caller.f_back
    return found


def main() -> None:
    """Print the path, then the counts."""
    steps = walk()
    for step in steps:
        print(f"{'  ' * step.depth}{step.file}: {step.function}")
    print(f"{len({step.file for step in steps})} files, {len(steps)} functions")


if __name__ == "__main__":
    main()
