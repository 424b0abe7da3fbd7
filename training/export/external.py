"""Writing an ONNX graph, with its weights in a file beside it where they are large."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx

LARGE_BYTES = 2**28
"""Size of a graph above which its weights are written beside it. protobuf reads files up to 2 GiB."""
SMALL_BYTES = 1024
"""Tensors below this size stay inside: onnxruntime infers shapes from some of them."""


def write_graph(model: onnx.ModelProto, folder: Path, name: str, large_bytes: int = LARGE_BYTES) -> dict[str, Any]:
    """Write `<name>.onnx` and, if the graph is large, `<name>.data`.

    Args:
        model: The graph; where it is large, its weights are removed from it.
        folder: Folder of the version, in which neither file exists.
        name: Name of the graph.
        large_bytes: Size above which weights are written beside the graph.

    Returns:
        File names and digests, as the manifest's entry of the graph has them.

    Raises:
        OSError: A file cannot be written.
    """
    path, data = folder / f"{name}.onnx", folder / f"{name}.data"
    if model.ByteSize() <= large_bytes:
        path.write_bytes(model.SerializeToString())
        return _entry(path)
    onnx.save_model(model, path, save_as_external_data=True, location=data.name, size_threshold=SMALL_BYTES)
    return {**_entry(path), "data": [_entry(data)]}


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
