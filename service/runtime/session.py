"""Sessions of onnxruntime: execution providers, threads, running a graph. No other file imports onnxruntime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import process
from service.contract.graphs import Axis, at_size, fraction_of
from service.contract.manifest import Graph
from service.errors import StartError

process.disable_onnxruntime_telemetry()
import onnxruntime as ort  # noqa: E402  # after the line above

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ERROR_SEVERITY = 3
AS_REQUESTED = 1
"""onnxruntime's number of the strategy by which an arena takes from the system what a tensor needs, and no more."""
FIRST_BYTES = 2**20
"""Memory that the arena takes at first."""
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


@cache
def _make_arena() -> None:
    """Make the arena that all graphs of images of free size share, once a process."""
    of_cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    known = {"arena_extend_strategy": AS_REQUESTED, "initial_chunk_size_bytes": FIRST_BYTES}
    ort.create_and_register_allocator(of_cpu, ort.OrtArenaCfg(known))


class Session:
    """An open graph: numpy arrays in, numpy arrays out, in the order in which its manifest names them.

    Graphs of images of free size run in an arena, in which a tensor takes the memory of those before it: fresh pages
    for each tensor took a quarter of the time for a photograph. The arena is emptied after each run.
    """

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
        self._free = provider == PROVIDERS["cpu"] and any(map(_size_axes, described.inputs.values()))
        # An arena keeps the memory of the largest batch until it is shrunk; malloc returns it to the system.
        options.enable_cpu_mem_arena = self._free
        if self._free:
            _make_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
            # Weights between the tensors of a run would keep the arena from shrinking.
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
            # Patterns are found by a hash of the shapes in which two inputs of one shape cancel each other out.
            options.enable_mem_pattern = False
            self._shrinking = ort.RunOptions()
            self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
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
        self._described = described

    def __call__(self, *arrays: NDArray[Any]) -> tuple[NDArray[np.float32], ...]:
        """Run the graph on float32 arrays, one an input, of the same number of rows.

        Raises:
            MemoryError: There is too little memory. Other errors are onnxruntime's own.
        """
        feed = dict(zip(self.inputs, arrays, strict=True))
        try:
            return self._bound(feed) if self._free else tuple(self._session.run(self.outputs, feed))
        except Exception as error:
            raise _as_memory_error(error) from error

    def _bound(self, feed: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], ...]:
        """Run with outputs outside of the arena, which cannot shrink below what it still holds."""
        rows, lengths = len(feed[self.inputs[0]]), self._lengths(feed)
        outputs = tuple(
            np.empty((rows, *at_size(axes, **lengths)), np.float32) for axes in self._described.outputs.values()
        )
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, output in zip(self.outputs, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, np.float32, output.shape, output.ctypes.data)
        self._session.run_with_iobinding(binding, self._shrinking)
        return outputs

    def _lengths(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """Height and width of the images that these inputs are of."""
        return {
            name: part * length
            for key, axes in self._described.inputs.items()
            for place, name, part in _size_axes(axes)
            for length in feed[key].shape[1 + place : 2 + place]
        }


def _size_axes(axes: Sequence[Axis]) -> list[tuple[int, str, int]]:
    """(index, `height` or `width`, divisor) of each axis whose length is height or width, or a fraction of it."""
    found = [(place, fraction_of(axis)) for place, axis in enumerate(axes) if isinstance(axis, str)]
    return [(place, *fraction) for place, fraction in found if fraction is not None]


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
