"""The library of ONNX functions by which torch exports, compiled once a process.

torch 2.13 compiles its 500 functions anew at every export, which is two thirds of the time that a small one takes.
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
    """A registry whose lists are its own, since an export adds its custom functions to them."""
    known, mine = _compiled(**options), ONNXRegistry()
    vars(mine).update(vars(known))
    mine.functions = {name: list(functions) for name, functions in known.functions.items()}
    return mine


def compile_once() -> None:
    """From now on."""
    ONNXRegistry.from_torchlib = staticmethod(_copied)  # type: ignore[method-assign, assignment]
