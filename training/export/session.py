"""Graphs opened with onnxruntime as the service opens them."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in service/runtime/session.py
import onnxruntime as ort  # after the line above


def opened(graph: Path | bytes) -> ort.InferenceSession:
    """Open a graph on the CPU with one thread, which is the caller's.

    Args:
        graph: The file, or its content.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
