"""One request to the service as a plain value: method, path, query, headers and body. Nothing here sends it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict
from urllib.parse import quote

import numpy as np

from vae_client.errors import InvalidRequest
from vae_client.images import NPY, Array, File, npy

Accept = Literal["arrays", "json", "png", "tiff", "gif"]
"""Form of an answer: `arrays` are binary where one array holds them, else JSON; `json` has every number and name; the
others are files."""
ACCEPT: Mapping[Accept, str] = {
    "arrays": f"{NPY}, application/json;q=0.5",
    "json": "application/json",
    "png": "image/png",
    "tiff": "image/tiff",
    "gif": "image/gif",
}
EVENTS = "text/event-stream"


class Common(TypedDict, total=False):
    """Keyword arguments of every operation.

    Attributes:
        model: Name of the model; by default the operation's default model.
        version: Version of the named model; by default its latest.
        accept: Form of the answer; by default `arrays`.
        timeout_s: Seconds until the answer must be there, retries included; by default those of the client.
    """

    model: str | None
    version: str | None
    accept: Accept
    timeout_s: float | None


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request.

    Attributes:
        method: GET or POST.
        path: From the root of the service on.
        query: Options.
        headers: Headers beside those of every request.
        content: The body; None without one, or with files.
        files: Files of a form by field, in order.
        timeout_s: Seconds until the answer must be there; None is the client's.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    files: Sequence[tuple[str, tuple[str, bytes]]] = ()
    timeout_s: float | None = None


def operation_call(
    operation: str,
    options: Mapping[str, Any],
    common: Common,
    files: Sequence[File] = (),
    masks: Sequence[File] = (),
    latents: Array | None = None,
) -> Call:
    """Make the request of an operation.

    One array goes as .npy, files and arrays with a mask as a form.

    Args:
        operation: Its name in the path.
        options: Its options; those that are None are left out.
        common: Model, version, form of the answer and deadline.
        files: Images.
        masks: Their masks.
        latents: Latents in place of images.

    Raises:
        InvalidRequest: A version is named without its model.
    """
    accept = common.get("accept") or "arrays"
    if accept == "arrays" and options.get("quality") == "refined":
        accept = "json"  # a binary answer has no room for the bound of each image
    query = {name: _text(value) for name, value in options.items() if value is not None}
    headers, content = {"accept": ACCEPT[accept]}, None
    form = [(name, (file.name, file.content)) for name, given in (("file", files), ("mask", masks)) for file in given]
    if latents is not None and operation == "interpolate":
        headers["content-type"] = "application/json"
        content = json.dumps({"latents": np.asarray(latents, np.float64).tolist()}, allow_nan=False).encode()
    elif latents is not None or (len(form) == 1 and files[0].array):
        headers["content-type"] = NPY
        content, form = files[0].content if latents is None else npy(latents), []
    return Call(
        method="POST",
        path=f"{model_path(common.get('model'), common.get('version'))}/{operation}",
        query=query,
        headers=headers,
        content=content,
        files=form,
        timeout_s=common.get("timeout_s"),
    )


def model_path(model: str | None, version: str | None) -> str:
    """Path of a version, of a model at its latest one, or of the default models.

    Raises:
        InvalidRequest: A version is named without its model.
    """
    if model is None and version is not None:
        raise InvalidRequest(f"version is {version!r}, but of which model? name it with model")
    path = "/v1" if model is None else f"/v1/models/{quote(model, safe='')}"
    return path if version is None else f"{path}/versions/{quote(version, safe='')}"


def _text(value: Any) -> str:
    """An option as the query string has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
