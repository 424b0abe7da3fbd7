"""All operations, and their warm-up. A new operation is one file and one line here."""

from __future__ import annotations

import types
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from typing import Any

from service.errors import ServiceError
from service.operations.decode import decode
from service.operations.denoise import denoise
from service.operations.encode import encode
from service.operations.inpaint import inpaint
from service.operations.interpolate import interpolate
from service.operations.operation import Operation
from service.operations.reconstruct import reconstruct
from service.operations.sample import sample
from service.operations.score import score
from service.operations.super_resolve import super_resolve
from service.operations.traverse import traverse
from service.runtime.model import Model
from service.runtime.program import Arrays, Trip

OPERATIONS = (encode, decode, reconstruct, denoise, inpaint, super_resolve, score, sample, interpolate, traverse)
"""In the order of the documentation."""


def warm_up(
    model: Model, golden: Mapping[str, Any], operations: tuple[Operation, ...] = OPERATIONS
) -> Iterator[tuple[Any, Arrays]]:
    """Run the warm-up requests of the operations that the model offers.

    A request ends with its first slice of iterative work, because further slices cost the same. Requests that the model
    refuses, such as a refinement without its graph, are skipped.

    Args:
        model: The model.
        golden: Its golden rows, by `graph/tensor`.
        operations: The operations.

    Yields:
        Each submitted program with its input arrays, in order of submission.
    """
    for operation in operations:
        for options in operation.warm_up_options(model):
            if operation.offered_by(model, options):
                with suppress(ServiceError):
                    yield from _trips(operation, model, golden, options)


def _trips(
    operation: Operation, model: Model, golden: Mapping[str, Any], options: Any
) -> Generator[tuple[Any, Arrays], None, None]:
    """Run one request without batcher and event loop; yield its programs with their input arrays."""
    options.check(model)
    running = operation.run(model, _submit, operation.warm_up_inputs(model, options, golden), options)
    trip = None
    while True:
        try:
            program, arrays = running.send(trip)
        except StopIteration:
            return
        yield program, arrays
        if program.rounds > 1:
            running.close()
            return
        trip = Trip(program.run(*arrays), 0.0, 0.0)


@types.coroutine
def _submit(program: Any, arrays: Arrays, **_: Any) -> Generator[tuple[Any, Arrays], Trip, Trip]:
    """Yield a program and its arrays to the code that drives the coroutine; return the trip that it sends."""
    return (yield program, arrays)
