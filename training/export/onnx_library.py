"""Cache of torch's library of ONNX functions, which is compiled once per process.

torch 2.13 compiles its 500 functions again at every export; that takes two thirds of the time of a small export.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch.onnx._internal.exporter._registration import ONNXRegistry

_compile = ONNXRegistry.from_torchlib


@cache
def _compiled(**options: Any) -> ONNXRegistry:
    return _compile(**options)


def _copied(**options: Any) -> ONNXRegistry:
    """A copy of the compiled registry with its own lists, because an export adds its custom functions to them."""
    known, mine = _compiled(**options), ONNXRegistry()
    vars(mine).update(vars(known))
    mine.functions = {name: list(functions) for name, functions in known.functions.items()}
    return mine


def compile_once() -> None:
    """Make every later export of this process share one compiled library."""
    ONNXRegistry.from_torchlib = staticmethod(_copied)  # type: ignore[method-assign, assignment]
