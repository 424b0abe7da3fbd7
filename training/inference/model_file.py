"""Loads a statistical model from a Python file: its parameters and its log joint density.

The file is the user's own code. It runs with all rights of the user, as any script does.
"""

from __future__ import annotations

import runpy
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from training.errors import ModelFileError, TrainingError
from training.inference.advi import Coordinates, LogJoint, Parameters
from training.progress import warn

EXAMPLE = 'such as parameters = {"mean": constraints.real, "weights": ((3,), constraints.positive)}'


@dataclass(frozen=True)
class StatisticalModel:
    """A log joint density over named parameters, for `advi.fit`."""

    parameters: Parameters
    log_joint: LogJoint
    start: dict[str, Tensor] | None
    """Values of the parameters, each (*shape), or None for the origin of their coordinates."""


def load(path: Path, data: Mapping[str, Tensor]) -> StatisticalModel:
    """Load a model file and try it once on the data.

    The file defines `parameters`, the support of each by name with its shape (none for one number), or a function of
    the data that returns them; `log_joint(parameters, data)`, which returns log p(data, parameters) in nats for one
    value of the parameters; and may define `start`, values of the parameters.

    Args:
        path: the Python file.
        data: columns by name, each (rows,).

    Raises:
        ModelFileError: the file, or what it defines, cannot be used; the message has its line.
        DataError: the model uses a column that the data lack.
    """
    if not path.is_file():
        raise ModelFileError(f"cannot read {path}: there is no such file")
    with _numerics(validate=True), _blamed(path):
        names = runpy.run_path(str(path))
        if missing := [name for name in ("parameters", "log_joint") if name not in names]:
            raise ModelFileError(f"{path} does not define {' and '.join(missing)}; see the example in docs/training.md")
        found = names["parameters"]
        parameters = _parameters(path, found(data) if callable(found) else found)
        start = (
            {name: torch.as_tensor(value).double() for name, value in names["start"].items()}
            if "start" in names
            else None
        )
    first = _first_values(path, parameters, start)
    log_joint: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor] = names["log_joint"]
    with _numerics(validate=True), _blamed(path):
        _try(path, log_joint, first, data)

    def each(values: dict[str, Tensor]) -> Tensor:
        count = len(next(iter(values.values())))
        return torch.stack([log_joint({name: value[i] for name, value in values.items()}, data) for i in range(count)])

    def together(values: dict[str, Tensor]) -> Tensor:
        return torch.vmap(lambda one: log_joint(one, data))(values)

    run = together
    try:
        with _numerics(validate=False):
            together({name: torch.stack([value, value]) for name, value in first.items()})
    except Exception as error:  # noqa: BLE001  # vmap raises whatever it cannot do
        run = each
        warn(f"log_joint runs one draw at a time, which is slower: {_first_line(error)}")

    def over_draws(**values: Tensor) -> Tensor:
        with _numerics(validate=False), _blamed(path):
            return run(values)

    return StatisticalModel(parameters, over_draws, start)


def _parameters(path: Path, found: Any) -> Parameters:
    if not isinstance(found, Mapping) or not found:
        raise ModelFileError(f"{path}: parameters must name at least one parameter with its support, {EXAMPLE}")
    spaces: dict[str, tuple[tuple[int, ...], Constraint]] = {}
    for name, space in found.items():
        shape, constraint = space if isinstance(space, tuple) and len(space) == 2 else ((), space)
        shape = (shape,) if isinstance(shape, int) else shape
        if not isinstance(constraint, Constraint):
            raise ModelFileError(f"{path}: parameter {name!r} must be a support or (shape, support), {EXAMPLE}")
        if not isinstance(shape, tuple) or len(shape) < constraint.event_dim:
            raise ModelFileError(
                f"{path}: parameter {name!r} needs a shape for its support, such as ((3,), {constraint})"
            )
        spaces[str(name)] = shape, constraint
    return spaces


def _first_values(path: Path, parameters: Parameters, start: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The parameters where the fit begins, each (*shape)."""
    try:
        coordinates = Coordinates(parameters)
        u = torch.zeros(1, coordinates.dim, dtype=torch.float64)
        if start is not None:
            u = coordinates.unconstrain({name: value.unsqueeze(0) for name, value in start.items()})
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from error
    return {name: value[0] for name, value in coordinates.constrain(u)[0].items()}


def _try(path: Path, log_joint: Any, first: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> None:
    """Call `log_joint` once, with torch's checks of distributions, to report errors before the fit."""
    values = {name: value.detach().requires_grad_() for name, value in first.items()}
    result = log_joint(values, data)
    if not isinstance(result, Tensor) or result.shape != ():
        got = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ModelFileError(f"{path}: log_joint must return one number as a torch tensor, not {got}; sum its terms")
    if not result.isfinite():
        where = ", ".join(f"{name} = {value.tolist()}" for name, value in first.items())
        raise ModelFileError(f"{path}: log_joint is {result.item()} at {where}; define `start`, where it is finite")
    unused = list(values)
    if result.requires_grad:
        gradients = torch.autograd.grad(result, list(values.values()), allow_unused=True)
        unused = [name for name, gradient in zip(values, gradients, strict=True) if gradient is None]
    if unused:
        raise ModelFileError(
            f"{path}: log_joint does not depend on {', '.join(unused)}; add its prior, compute in torch, or remove it"
        )


@contextmanager
def _numerics(*, validate: bool) -> Iterator[None]:
    """Within, new tensors are float64, and torch's distributions check their arguments or not."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    Distribution.set_default_validate_args(validate)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        Distribution.set_default_validate_args(__debug__)


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Turn an exception of the user's code into one that names its line."""
    try:
        yield
    except TrainingError:
        raise
    except SyntaxError as error:
        raise ModelFileError(f"{path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # the user's code raises whatever it raises
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = f", line {lines[-1]}" if lines else ""
        raise ModelFileError(f"{path}{line}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip(':') if text else ''}"
