"""Sessions of onnxruntime: execution providers, threads, running a graph. No other file imports onnxruntime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import process
from service.contract.graphs import Axis
from service.contract.manifest import Graph
from service.errors import StartError

process.disable_onnxruntime_telemetry()
import onnxruntime as ort  # noqa: E402  # after the line above

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ERROR_SEVERITY = 3
FLOAT32 = "tensor(float)"
NO_MEMORY = ("bad_alloc", "Failed to allocate memory")
"""What onnxruntime's errors say where memory is lacking, in its own words and the operating system's."""


def execution_provider(wanted: str) -> str:
    """onnxruntime's name of the execution provider for `auto`, `cpu` or `cuda`.

    Raises:
        StartError: CUDA is wanted and this onnxruntime has none.
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
    """An open graph: numpy arrays in, numpy arrays out, in the order in which its manifest names them."""

    def __init__(
        self,
        graph: bytes,
        provider: str,
        threads: int,
        described: Graph,
        data: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Open a graph and bind its tensors by name.

        Args:
            graph: The ONNX file.
            provider: onnxruntime's name of the execution provider.
            threads: Threads of one run.
            described: The graph's entry in the manifest, whose tensors are in the order of the graph's signature.
            data: Contents of its files of external data, by name. Nothing is read from files.

        Raises:
            StartError: Its tensors have other names, types or shapes than described, or the provider is missing.
            MemoryError: There is too little memory. Other errors are onnxruntime's own.
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
        if data:
            options.add_external_initializers_from_files_in_memory(
                list(data), list(data.values()), [len(content) for content in data.values()]
            )
        fallback = [] if provider == PROVIDERS["cpu"] else [PROVIDERS["cpu"]]
        try:
            self._session = ort.InferenceSession(graph, options, providers=[provider, *fallback])
        except Exception as error:
            raise _as_memory_error(error) from error
        if self._session.get_providers()[0] != provider:
            raise StartError(
                f"onnxruntime could not open {provider} and fell back; see its log for the missing library"
            )
        _compare("inputs", self._session.get_inputs(), described.inputs)
        _compare("outputs", self._session.get_outputs(), described.outputs)
        self.inputs, self.outputs = list(described.inputs), list(described.outputs)

    def __call__(self, *arrays: NDArray[Any]) -> tuple[NDArray[np.float32], ...]:
        """Run the graph on float32 arrays, one an input, of the same number of rows.

        Raises:
            MemoryError: There is too little memory. Other errors are onnxruntime's own.
        """
        feed = dict(zip(self.inputs, arrays, strict=True))
        try:
            return tuple(self._session.run(self.outputs, feed))
        except Exception as error:
            raise _as_memory_error(error) from error


def _as_memory_error(error: Exception) -> Exception:
    """The error, as a MemoryError where its text names exhausted memory."""
    return MemoryError(str(error)) if any(words in str(error) for words in NO_MEMORY) else error


def _compare(kind: str, tensors: Sequence[Any], described: Mapping[str, Sequence[Axis]]) -> None:
    """Refuses tensors that differ from the manifest's, as far as the graph gives their shapes.

    Raises:
        StartError: A name, type or shape differs.
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
