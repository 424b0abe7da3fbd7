"""An answer of an operation: its arrays or its file, and what the service says of it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from vae_client.errors import ClientError, missing
from vae_client.files import write

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

NOT_ARRAYS = {"model", "version", "fingerprint", "seed", "notes", "binarisation", "std_scale", "noise"}
"""Fields of a JSON answer that are no arrays of numbers."""
PAIR = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
NOTE = re.compile(r'([\w*.-]+)((?:;\w+="(?:[^"\\]|\\.)*")*)')
TIMING = re.compile(r"([\w-]+);dur=([\d.]+)")


@dataclass(frozen=True)
class Note:
    """A note of the service about special rows.

    Attributes:
        code: Stable name, such as `level_clipped`.
        rows: Places of the rows in the request.
        detail: A sentence for people.
        more: Whether further rows are meant, which a binary answer or a picture does not list.
    """

    code: str
    rows: tuple[int, ...]
    detail: str
    more: bool = False


class Output:
    """An array of an answer as its attribute."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, answer: None, owner: type) -> Output: ...
    @overload
    def __get__(self, answer: Answer, owner: type) -> NDArray[np.float32]: ...
    def __get__(self, answer: Answer | None, owner: type) -> Output | NDArray[np.float32]:
        if answer is None:
            return self
        if self.name not in answer.outputs:
            held = ", ".join(answer.outputs) or f"a file of type {answer.media_type}"
            raise AttributeError(f"the answer has no {self.name}; it has {held}")
        return answer.outputs[self.name]


@dataclass(frozen=True)
class Answer:
    """An answer of an operation.

    Its arrays are attributes: `answer.images`, `answer.mean`. One that the answer lacks is an AttributeError, which
    names those that it has.

    Attributes:
        outputs: Arrays by name; empty where the answer is a file.
        content: The bytes of the file; empty where the answer is arrays.
        media_type: Type of what was sent.
        model: Name of the model that answered.
        version: Its version.
        fingerprint: Identity of its weights; send it back with latents.
        seed: Seed of what was drawn; None where nothing was. The same request with it has the same answer.
        notes: What is special about some rows.
        timing: Milliseconds by step, such as `queue` and `inference`.
        noise: Kind of the noise of each image, where `noise=auto` found it.
        binarisation: How the scored images were made black and white.
        std_scale: The `std` that the last colour of a heat map stands for.
        request_id: Id of the request in the service's log.
    """

    outputs: Mapping[str, NDArray[np.float32]]
    content: bytes = field(repr=False, default=b"")
    media_type: str = ""
    model: str = ""
    version: str = ""
    fingerprint: str = ""
    seed: int | None = None
    notes: tuple[Note, ...] = ()
    timing: Mapping[str, float] = field(default_factory=dict)
    noise: tuple[str, ...] = ()
    binarisation: str = ""
    std_scale: float | None = None
    request_id: str = ""

    images = Output()
    std = Output()
    completions = Output()
    level = Output()
    mean = Output()
    log_var = Output()
    latents = Output()
    elbo = Output()
    log_likelihood = Output()
    kl = Output()
    refined_elbo = Output()
    importance_weighted = Output()
    standard_error = Output()
    percentile = Output()
    error = Output()

    def pictures(self) -> list[PillowImage]:
        """The images as PIL images: of 8 bits where the answer is arrays, pages or frames of the file otherwise.

        Raises:
            MissingExtra: Pillow is not installed.
        """
        try:
            from PIL import Image, ImageSequence  # noqa: PLC0415  # an extra
        except ImportError as error:
            raise missing("pictures", "Pillow", "Answer.pictures()") from error
        if self.content:
            return [frame.copy() for frame in ImageSequence.Iterator(Image.open(io.BytesIO(self.content)))]
        levels = np.rint(np.clip(self.images, 0, 1) * 255).astype(np.uint8)
        return [Image.fromarray(one[0] if len(one) == 1 else np.moveaxis(one, 0, -1)) for one in levels]

    def save(self, path: str | Path) -> None:
        """Write the answer: the file as it came, else arrays as .npz, or as .npy where there is one.

        The file appears whole or not at all.

        Raises:
            ClientError: The arrays do not go into that kind of file.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if self.content:
            write(path, self.content)
        elif suffix == ".npz":
            about = ("model", "version", "fingerprint", "seed", "noise", "binarisation")
            known = {name: np.array(value) for name in about if (value := getattr(self, name)) not in (None, "", ())}
            file = io.BytesIO()
            np.savez(file, allow_pickle=False, **{**self.outputs, **known})
            write(path, file.getvalue())
        elif suffix == ".npy" and len(shown := self.rows_alone()) == 1:
            file = io.BytesIO()
            np.save(file, next(iter(shown.values())), allow_pickle=False)
            write(path, file.getvalue())
        else:
            raise ClientError(f"the answer has {', '.join(self.outputs)}, which {path.name} does not hold; use .npz")

    def rows_alone(self) -> dict[str, NDArray[np.float32]]:
        """The arrays without `level` and the like, of which other arrays are the answer."""
        kept = {name: array for name, array in self.outputs.items() if name not in ("level", "elbo")}
        return kept or dict(self.outputs)

    def about(self) -> dict[str, Any]:
        """What the service says of the answer, for JSON."""
        told = {
            "model": self.model,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "notes": [{"code": one.code, "rows": list(one.rows), "detail": one.detail} for one in self.notes],
            "timing_ms": dict(self.timing),
            "noise": list(self.noise),
            "binarisation": self.binarisation,
            "std_scale": self.std_scale,
            "request_id": self.request_id,
        }
        return {name: value for name, value in told.items() if value not in (None, "", [], {})}


def answer_of(headers: Mapping[str, str], content: bytes) -> Answer:
    """Read an answer.

    Args:
        headers: Its headers, by names in lower case.
        content: Its body.

    Raises:
        ClientError: It is none that this package reads.
    """
    media_type = headers.get("content-type", "").split(";")[0].strip()
    about: dict[str, Any] = {
        "media_type": media_type,
        "timing": {name: float(value) for name, value in TIMING.findall(headers.get("server-timing", ""))},
        "request_id": headers.get("x-request-id", ""),
    }
    if media_type == "application/json":
        return json_answer(json_of(content), **about)
    if "x-model" not in headers:
        raise ClientError(f"the answer of type {media_type!r} is none of the VAE service; check the address")
    seed, scale, level = headers.get("x-seed"), headers.get("x-std-scale"), headers.get("x-level")
    about |= {
        "model": headers["x-model"],
        "version": headers.get("x-model-version", ""),
        "fingerprint": headers.get("x-fingerprint", ""),
        "seed": None if seed is None else int(seed),
        "notes": tuple(_notes(headers.get("x-note", ""))),
        "noise": tuple(filter(None, headers.get("x-noise", "").split(","))),
        "binarisation": headers.get("x-binarisation", ""),
        "std_scale": None if scale is None else float(scale),
    }
    levels = {} if level is None else {"level": np.array(level.split(","), np.float32)}
    if media_type.startswith("image/"):
        return Answer(levels, content, **about)
    array = np.load(io.BytesIO(content), allow_pickle=False)
    names = headers["x-outputs"].split(",")
    planes = [array] if len(names) == 1 else [array[:, k] for k in range(len(names))]
    return Answer({**dict(zip(names, planes, strict=True)), **levels}, **about)


def json_of(content: bytes) -> dict[str, Any]:
    """The object of a JSON body.

    Raises:
        ClientError: It is none.
    """
    try:
        told = json.loads(content)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise ClientError("the answer is none of the VAE service; check the address")
    return told


def json_answer(told: Mapping[str, Any], **about: Any) -> Answer:
    """Read an answer in JSON.

    Args:
        told: Its fields.
        **about: Attributes of the answer that come from elsewhere.
    """
    outputs = {name: np.array(value, np.float32) for name, value in told.items() if name not in NOT_ARRAYS}
    known = {name: told[name] for name in NOT_ARRAYS - {"notes", "noise"} if name in told}
    notes = tuple(Note(one["code"], tuple(one["rows"]), one["detail"]) for one in told.get("notes", ()))
    return Answer(outputs, **{**about, **known, "notes": notes, "noise": tuple(told.get("noise", ()))})


def _notes(header: str) -> Iterator[Note]:
    """The notes of the header X-Note, a list of structured fields (RFC 9651)."""
    for code, rest in NOTE.findall(header):
        told = {name: re.sub(r"\\(.)", r"\1", value) for name, value in PAIR.findall(rest)}
        rows = told.get("rows", "").split()
        yield Note(code, tuple(int(row) for row in rows if row != "..."), told.get("detail", ""), "..." in rows)
