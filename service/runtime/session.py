"""The only file that imports onnxruntime: execution providers, threads, running a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import process
from service.contract.manifest import Graph
from service.errors import StartError

process.disable_onnxruntime_telemetry()
import onnxruntime as ort  # noqa: E402  # after the line above

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ERROR_SEVERITY = 3
FLOAT32 = "tensor(float)"
NO_MEMORY = ("bad_alloc", "Failed to allocate memory")
"""How onnxruntime says that there is none, in its own and in the operating system's words."""


def execution_provider(wanted: str) -> str:
    """`auto`, `cpu` or `cuda` to onnxruntime's name of the provider.

    Raises: StartError where CUDA is asked for and this onnxruntime has none.
    """
    available = ort.get_available_providers()
    if wanted == "auto":
        wanted = "cuda" if PROVIDERS["cuda"] in available else "cpu"
    if PROVIDERS[wanted] not in available:
        raise StartError(
            f"VAE_EXECUTION_PROVIDER is {wanted} but this onnxruntime offers {', '.join(available)}; install the `gpu` "
            "extra on a machine with CUDA, or set it to auto or cpu"
        )
    return PROVIDERS[wanted]


class Session:
    """One graph, opened: numpy arrays in, numpy arrays out, in the order of `described`, else of the graph."""

    def __init__(self, graph: bytes, provider: str, threads: int, described: Graph | None = None) -> None:
        """Open it.

        Raises: StartError where its inputs and outputs are others than described; MemoryError; else onnxruntime's own.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = ERROR_SEVERITY
        # A thread that spins while idle takes a core from whoever has work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # What `check_graph` has looked through is ONNX; onnxruntime's own format is read in other ways.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        # The arena keeps the largest batch's memory for ever; malloc gives it back.
        options.enable_cpu_mem_arena = False
        fallback = [] if provider == PROVIDERS["cpu"] else [PROVIDERS["cpu"]]
        try:
            self._session = ort.InferenceSession(graph, options, providers=[provider, *fallback])
        except Exception as error:
            raise _told(error) from error
        if self._session.get_providers()[0] != provider:
            raise StartError(
                f"onnxruntime could not open {provider} and fell back; see its log for the missing library"
            )
        self.inputs = [tensor.name for tensor in self._session.get_inputs()]
        self.outputs = [tensor.name for tensor in self._session.get_outputs()]
        if described is not None:
            _compare("inputs", self._session.get_inputs(), described.inputs)
            _compare("outputs", self._session.get_outputs(), described.outputs)
            self.inputs, self.outputs = list(described.inputs), list(described.outputs)

    def __call__(self, *arrays: NDArray[Any]) -> tuple[NDArray[np.float32], ...]:
        """Run the graph on float32 arrays, one an input, sharing their first axis.

        Raises: MemoryError where there is too little for it, else onnxruntime's own.
        """
        feed = dict(zip(self.inputs, arrays, strict=True))
        try:
            return tuple(self._session.run(self.outputs, feed))
        except Exception as error:
            raise _told(error) from error


def _told(error: Exception) -> Exception:
    """The error itself, or a MemoryError where that is what it says."""
    return MemoryError(str(error)) if any(words in str(error) for words in NO_MEMORY) else error


def _compare(kind: str, tensors: Sequence[Any], described: Mapping[str, Sequence[int]]) -> None:
    """Whether a graph's tensors are those of its manifest, as far as the graph tells their shapes.

    Raises: StartError.
    """
    names = {tensor.name for tensor in tensors}
    if names != described.keys():
        raise StartError(
            f"its {kind} are {_joined(sorted(names))}, in the manifest {_joined(sorted(described))}; "
            "export the model again"
        )
    for tensor in tensors:
        shape, wanted = tensor.shape, described[tensor.name]
        fits = (
            len(shape) == 1 + len(wanted)
            and not isinstance(shape[0], int)
            and all(found == size or not isinstance(found, int) for found, size in zip(shape[1:], wanted, strict=True))
        )
        if tensor.type != FLOAT32 or (shape and not fits):  # no shape where the graph tells none
            raise StartError(
                f"{tensor.name} of its {kind} is {tensor.type} of shape {_joined(shape)}, in the manifest float32 of "
                f"shape {_joined(['any', *wanted])}; export the model again"
            )


def _joined(values: Iterable[Any]) -> str:
    return f"[{', '.join(map(str, values))}]"
