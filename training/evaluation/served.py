"""An HTTP client of a service: of a running one, or of a `python -m service` that it starts and ends."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from service.contract.images import Pixels
from service.contract.manifest import FILE_NAME
from training.errors import RefusedError, ServiceError

ROOT = Path(__file__).parents[2]
READY_S = 60.0
ANSWER_S = 600.0
ROWS = 16
"""Rows in one request."""
NPY = "application/x-npy"


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Options of a command that asks a service.

    Attributes:
        data: Folder of the data sets.
        url: URL of a running service; None starts one.
        models: Model repository of the started service.
        images: Images of each data set.
        seed: Seed of the images and of what is done to them.
        names: Pattern of the models' names.
    """

    data: Path
    url: str | None
    models: Path
    images: int = 200
    seed: int = 0
    names: str = "*"

    @classmethod
    def of(cls, options: argparse.Namespace, **others: Any) -> Self:
        """Take the options of a command line; `others` replace those of the same name.

        Args:
            options: Those of a parser made by `cli.asking_command`.
            **others: Values that the command line does not hold as they are.
        """
        given = {field.name: getattr(options, field.name) for field in fields(cls)}
        return cls(**given | others)


class Answer(NamedTuple):
    """An answer of the service.

    Attributes:
        outputs: Arrays by name, (n, ...) each.
        level: Noise level of each image, (n,); None if the answer has none.
    """

    outputs: dict[str, Pixels]
    level: NDArray[np.float64] | None


class Client:
    """The requests that calibration and experiments make.

    Args:
        http: A client with the base URL of the service.
    """

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def await_ready(self) -> None:
        """Wait until the service is ready.

        Raises:
            ServiceError: It is not ready after a minute.
        """
        end, said = time.monotonic() + READY_S, ""
        while time.monotonic() < end:
            try:
                answer = self._http.get("/health/ready")
            except httpx.TransportError as error:
                said = str(error)
            else:
                if answer.status_code == httpx.codes.OK:
                    return
                said = answer.text
            time.sleep(0.1)
        raise ServiceError(f"no service is ready at {self._http.base_url} ({said}); start one, or leave --url out")

    def models(self) -> list[dict[str, Any]]:
        """Describe every model at its latest version, as `GET /v1/models/{model}` does.

        Raises:
            RefusedError: The service refuses.
        """
        names = [one["model"] for one in self._checked(self._http.get("/v1/models")).json()["models"]]
        return [self._checked(self._http.get(f"/v1/models/{name}")).json() for name in names]

    def images(self, model: str, operation: str, rows: Pixels, mask: Pixels | None = None, **options: object) -> Answer:
        """Run an operation on rows, sent and received as .npy, `ROWS` rows a request.

        Args:
            model: Name of the model.
            operation: Name of the operation.
            rows: Images, (n, c, h, w).
            mask: 1 where a pixel is observed, else 0, (n, c, h, w), equal in all channels; None without a mask.
            **options: Options of the operation.

        Returns:
            The outputs of all rows.

        Raises:
            RefusedError: The service refuses; the message is the problem's detail.
            ServiceError: The service does not answer.
        """
        answers = [
            self._ask(model, operation, rows[k : k + ROWS], None if mask is None else mask[k : k + ROWS], options)
            for k in range(0, len(rows), ROWS)
        ]
        outputs = {name: np.concatenate([one.outputs[name] for one in answers]) for name in answers[0].outputs}
        levels = [one.level for one in answers if one.level is not None]
        return Answer(outputs, np.concatenate(levels) if levels else None)

    def picture(self, model: str, operation: str, content: bytes, kind: str, **options: object) -> Answer:
        """Run an operation on one picture file, received as .npy.

        Args:
            model: Name of the model.
            operation: Name of the operation.
            content: The file.
            kind: Its media type.
            **options: Options of the operation.

        Returns:
            The outputs, of one row.

        Raises:
            RefusedError: The service refuses; the message is the problem's detail.
            ServiceError: The service does not answer.
        """
        headers = {"content-type": kind, "accept": NPY}
        return self._answer(self._post(model, operation, options, content=content, headers=headers))

    def figures(self, model: str, operation: str, rows: Pixels, **options: object) -> dict[str, NDArray[np.float64]]:
        """Run an operation whose JSON answer has a number for each row, `ROWS` rows a request.

        Args:
            model: Name of the model.
            operation: Name of the operation.
            rows: Images, (n, c, h, w).
            **options: Options of the operation.

        Returns:
            Figures by name, (n,) each.

        Raises:
            RefusedError: The service refuses; the message is the problem's detail.
            ServiceError: The service does not answer.
        """
        parts: list[dict[str, Any]] = []
        for k in range(0, len(rows), ROWS):
            said = {"content-type": NPY, "accept": "application/json"}
            answer = self._post(model, operation, options, content=npy(rows[k : k + ROWS]), headers=said).json()
            answer.pop("notes", None)
            parts.append({name: value for name, value in answer.items() if isinstance(value, list)})
        return {name: np.concatenate([np.asarray(part[name], np.float64) for part in parts]) for name in parts[0]}

    def _ask(self, model: str, operation: str, rows: Pixels, mask: Pixels | None, options: dict[str, object]) -> Answer:
        if mask is None:
            answer = self._post(model, operation, options, content=npy(rows), headers={"content-type": NPY})
        else:
            files = {"file": ("seen.npy", npy(rows)), "mask": ("mask.npy", npy(mask[:, :1]))}  # channels are equal
            answer = self._post(model, operation, options, files=files, headers={"accept": NPY})
        return self._answer(answer)

    @staticmethod
    def _answer(answer: httpx.Response) -> Answer:
        names, array = answer.headers["x-outputs"].split(","), np.load(io.BytesIO(answer.content), allow_pickle=False)
        planes = [array] if len(names) == 1 else list(array.swapaxes(0, 1))
        told = answer.headers.get("x-level")
        level = None if told is None else np.array([float(value) for value in told.split(",")])
        return Answer(dict(zip(names, planes, strict=True)), level)

    def _post(self, model: str, operation: str, options: dict[str, object], **body: Any) -> httpx.Response:
        query = {name: str(value).lower() for name, value in options.items()}
        try:
            answer = self._http.post(f"/v1/models/{model}/{operation}", params=query, **body)
        except httpx.TransportError as error:
            raise ServiceError(f"{self._http.base_url} does not answer {operation} ({error})") from error
        return self._checked(answer)

    @staticmethod
    def _checked(answer: httpx.Response) -> httpx.Response:
        if answer.is_success:
            return answer
        problem = answer.json() if "json" in answer.headers.get("content-type", "") else {}
        detail = problem.get("detail", answer.text[:200])
        raise RefusedError(f"{answer.request.url.path}: {answer.status_code} {detail}", problem.get("code", ""))


def offering(operation: str, names: str, told: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Select the models that offer an operation.

    Args:
        operation: Name of the operation.
        names: Pattern of the models' names.
        told: Descriptions of models, as `Client.models` returns them.

    Returns:
        The descriptions that match.
    """
    return [one for one in told if operation in one["operations"] and fnmatch(one["model"], names)]


def npy(array: Pixels) -> bytes:
    """Encode an array as a float32 .npy file."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array, np.float32), allow_pickle=False)
    return file.getvalue()


@contextmanager
def served(url: str | None, models: Path) -> Iterator[Client]:
    """Make a client of a service, and wait until the service is ready.

    Args:
        url: URL of a running service; None starts one, which ends with the block.
        models: Model repository of the started service.

    Yields:
        The client.

    Raises:
        ServiceError: The service does not become ready.
    """
    if url is None:
        settings = {"VAE_MODELS": str(models.absolute()), "VAE_THREADS": "1", "VAE_TIMEOUT_S": str(ANSWER_S)}
        names = sorted(path.parts[-3] for path in models.glob(f"*/*/{FILE_NAME}"))
        if names:
            settings["VAE_DEFAULT_MODEL"] = names[0]  # any model will do, because every request names its model
        with started(**settings) as (_, own), served(own, models) as client:
            yield client
        return
    with httpx.Client(base_url=url, timeout=ANSWER_S) as http:
        client = Client(http)
        client.await_ready()
        yield client


@contextmanager
def started(**settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start `python -m service` on a free port of the loopback interface, and end it with the block.

    Args:
        **settings: Environment variables of the service; others that begin with `VAE_` are removed.

    Yields:
        The process and its URL.

    Raises:
        ServiceError: It does not start; the message ends with its standard error.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VAE_")}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(  # this project's own command
            [sys.executable, "-m", "service"], cwd=ROOT, env={**clean, "VAE_PORT": "0", **settings},
            stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
            if not found:
                process.wait()
                errors.seek(0)
                raise ServiceError(f"the service does not start: {errors.read().strip()[-500:]}")
            yield process, found.group()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # ends its workers too; the service has no state to lose
            process.communicate()
