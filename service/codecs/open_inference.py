"""The Open Inference Protocol, version 2, over REST: tensors in JSON, or as bytes behind it (Triton's extension).

Source:
    Open Inference Protocol, specification/protocol/inference_rest.md; Triton, docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import orjson
import simdjson
from numpy.typing import NDArray

from service.codecs.payload import FLOAT, Answer, Body, Intake, Meter, check_scale, from_bfloat16
from service.codecs.structured import array_slices, fields_of, numbers_of, plain, with_object
from service.errors import InvalidOption, InvalidShape, InvalidValue, Unreadable, quoted

READ_TYPES: dict[str, np.dtype[Any]] = {
    "FP32": FLOAT,
    "FP64": np.dtype("<f8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "UINT8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Types of inputs, as they lie in bytes; those of BF16 are the upper halves of float32."""
WRITTEN_TYPES = {"f": "FP32", "i": "INT64", "U": "BYTES", "O": "BYTES"}
"""Types of outputs, by numpy's letter for the kind of the elements."""
MOST_TENSORS = 16
MOST_AXES = 8
LIKE = '{"inputs": [{"name": ..., "shape": [...], "datatype": "FP32", "data": [...]}]}'
REMEMBERED = 1024
"""Longest JSON object before bytes, in bytes, that is cached."""
HEAD = {"model", "version"}
"""Fields of an answer that the response has under other names."""
SIZE = struct.Struct("<I")
"""What precedes each text in bytes."""


class Described(NamedTuple):
    """An input, as the JSON object describes it.

    Attributes:
        name: Its name.
        shape: Its shape.
        datatype: One of `READ_TYPES`.
        size: Its bytes behind the JSON object; None where its numbers are in the object.
    """

    name: str
    shape: tuple[int, ...]
    datatype: str
    size: int | None


class Head(NamedTuple):
    """The JSON object of an inference request, without the numbers of its inputs.

    Attributes:
        inputs: The inputs, in their order.
        parameters: Of the request, by name.
        identity: The caller's id; None without one.
        outputs: Names of the outputs to send, each with whether it is sent as bytes; empty sends all.
        binary: Whether outputs are sent as bytes where `outputs` is empty.
    """

    inputs: tuple[Described, ...] = ()
    parameters: Mapping[str, Any] = MappingProxyType({})
    identity: str | None = None
    outputs: Mapping[str, bool] = MappingProxyType({})
    binary: bool = False


class Request(NamedTuple):
    """An inference request: the JSON object, and the inputs by name, of their shapes."""

    head: Head
    arrays: Mapping[str, NDArray[Any]]


def read(body: Body, head: int | None, intake: Intake) -> Request:
    """Read a request.

    Args:
        body: The JSON object, and the bytes of its binary tensors, one after the other.
        head: Bytes of the JSON object, which is the whole body where this is None. 0 stands for a raw request: the
            body is the input itself, float32.
        intake: What the operation takes.

    Raises:
        Unreadable: The body is not such an object, or its bytes are more or fewer than the object says.
        InvalidShape: A tensor is not of its shape, or of a type that is not read.
        InvalidValue: A number is not one of the tensor's type.
        InvalidOption: A parameter or a field is unknown.
        TooLarge: It needs too much memory.
        Overloaded: Other requests leave too little memory.
    """
    if head is None:
        return with_object(body, intake.meter, LIKE, lambda content: _request(content, memoryview(b""), intake))
    if not 0 <= head <= len(body):
        raise Unreadable(f"Inference-Header-Content-Length is {head}; it must be in the range (0, {len(body)})")
    if head == 0:
        return Request(Head(binary=True), {intake.name: _raw(body, intake)})
    text, rest = bytes(body[:head]), memoryview(body)[head:]
    if head <= REMEMBERED and (known := _remembered(text)) is not None:
        return _filled(known, {}, rest, intake)
    return with_object(text, intake.meter, LIKE, lambda content: _request(content, rest, intake))


def read_fields(body: Body, meter: Meter) -> dict[str, Any]:
    """The fields of the JSON object in a body that holds no tensors; empty for an empty body.

    Raises:
        Unreadable: The body is not such an object.
        InvalidOption: A field is there twice.
    """
    return with_object(body, meter, "{}", _fields)


def _fields(content: simdjson.Object) -> dict[str, Any]:
    """Fields of an object, and the fields of an object in it."""
    return {
        name: _parameters(value) if isinstance(value, simdjson.Object) else plain(value)
        for name, value in fields_of(content).items()
    }


def _raw(body: Body, intake: Intake) -> NDArray[Any]:
    """The rows of a raw request."""
    if not intake.name or 0 in intake.shape or intake.variants:
        advice = "takes no input" if not intake.name else f"takes {intake.name} of any size, which bytes do not tell"
        raise InvalidShape(f"the model {advice}; send a JSON object before them, and its length in the header")
    row_bytes = math.prod(intake.shape) * FLOAT.itemsize
    if not body or len(body) % row_bytes:
        raise InvalidShape(
            f"{len(body)} bytes are not a whole number of float32 rows {intake.shape} of {row_bytes} bytes"
        )
    return np.frombuffer(body, FLOAT).reshape(-1, *intake.shape)


@lru_cache(1024)
def _remembered(text: bytes) -> Head | None:
    """The head of a request whose inputs are all bytes, else None: a client repeats it, and only the bytes change."""
    head = with_object(text, Meter(), LIKE, lambda content: _described(content)[0])
    return None if any(one.size is None for one in head.inputs) else head


def _request(content: simdjson.Object, rest: memoryview, intake: Intake) -> Request:
    return _filled(*_described(content), rest, intake)


def _described(content: simdjson.Object) -> tuple[Head, dict[str, Any]]:
    """The head, and what is not yet read of the JSON object: the data of inputs by name."""
    named = fields_of(content)
    identity, parameters = named.get("id"), _parameters(named.get("parameters"))
    if not (identity is None or isinstance(identity, str)):
        raise Unreadable("id must be a string")
    binary = parameters.pop("binary_data_output", False)
    inputs: list[Described] = []
    data: dict[str, Any] = {}
    for entry in _entries(named.get("inputs"), "inputs"):
        name = _name(entry, data)
        inputs.append(_input(name, entry))
        data[name] = entry.get("data")
    outputs: dict[str, bool] = {}
    for entry in _entries(named.get("outputs"), "outputs"):
        known = _parameters(entry.get("parameters"))
        if known.get("classification"):
            raise InvalidOption("outputs are no scores of classes; leave classification out")
        outputs[_name(entry, outputs)] = bool(known.get("binary_data", False))
    return Head(tuple(inputs), parameters, identity, outputs, bool(binary)), data


def _filled(head: Head, data: Mapping[str, Any], rest: memoryview, intake: Intake) -> Request:
    """The request, its inputs read of the JSON object's `data` and of the bytes behind it."""
    arrays: dict[str, NDArray[Any]] = {}
    place = 0
    for one in head.inputs:
        if one.size is None:
            arrays[one.name] = _of_json(one, data[one.name])
        else:
            arrays[one.name], place = _of_bytes(one, rest[place:], intake), place + one.size
    if place < len(rest):
        raise Unreadable(f"{len(rest) - place} bytes follow the tensors that the JSON object names; name them too")
    return Request(head, arrays)


def _entries(value: Any, what: str) -> list[dict[str, Any]]:
    """The fields of each object in a list; empty where there is no list."""
    if value is None:
        return []
    if not isinstance(value, simdjson.Array) or len(value) > MOST_TENSORS:
        raise Unreadable(f"{what} must be a list of at most {MOST_TENSORS} objects")
    found = []
    for entry in value:
        if not isinstance(entry, simdjson.Object):
            raise Unreadable(f"{what} must be a list of objects, each with a name")
        found.append(fields_of(entry))
    return found


def _name(entry: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    name = entry.get("name")
    if not isinstance(name, str):
        raise Unreadable("each tensor needs a name, as text")
    if name in known:
        raise InvalidOption(f"the tensor {quoted(name)} is there twice; send it once")
    return name


def _parameters(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, simdjson.Object):
        raise Unreadable("parameters must be an object of strings, numbers and booleans")
    return {name: plain(one) for name, one in fields_of(value).items()}


def _input(name: str, entry: Mapping[str, Any]) -> Described:
    """What an entry of `inputs` says of its tensor."""
    shape, datatype, parameters = _shape(name, entry), entry.get("datatype"), _parameters(entry.get("parameters"))
    if not (isinstance(datatype, str) and datatype in READ_TYPES):
        raise InvalidShape(
            f"the datatype of {quoted(name)} is {quoted(str(datatype))}; {', '.join(READ_TYPES)} are read: send FP32, "
            "or levels of 0 to 255 as UINT8"
        )
    if any(key.startswith("shared_memory") for key in parameters):
        raise InvalidOption("shared memory is not read; send the tensor as binary data")
    size, whole = parameters.get("binary_data_size"), math.prod(shape) * READ_TYPES[datatype].itemsize
    if (size is None) == ("data" not in entry):
        raise Unreadable(f"the tensor {quoted(name)} needs either data or the parameter binary_data_size, and not both")
    if size is not None and (type(size) is not int or size != whole):
        raise InvalidShape(
            f"the binary_data_size of {quoted(name)} is {quoted(str(size))[1:-1]}; {datatype} of shape {[*shape]} has "
            f"{whole} bytes"
        )
    return Described(name, shape, datatype, size)


def _of_bytes(one: Described, rest: memoryview, intake: Intake) -> NDArray[Any]:
    """An input from the first of the bytes that follow the JSON object and the inputs before it."""
    name, shape, datatype, size = one
    assert size is not None
    if size > len(rest):
        raise Unreadable(f"unexpected size for input {quoted(name)}, expecting {size - len(rest)} additional bytes")
    array = np.frombuffer(rest[:size], READ_TYPES[datatype]).reshape(shape)
    if array.dtype == FLOAT and array.flags.aligned:
        return array
    if datatype != "BF16" and intake.keeps_levels(array):
        check_scale(array, intake.name)
        intake.meter.reserve(array.nbytes)
        return array
    intake.meter.reserve(array.size * FLOAT.itemsize)
    return from_bfloat16(array) if datatype == "BF16" else array.copy()


def _shape(name: str, entry: Mapping[str, Any]) -> tuple[int, ...]:
    value = entry.get("shape")
    axes: list[Any] = [*value] if isinstance(value, simdjson.Array) and len(value) <= MOST_AXES else [None]
    if not all(type(axis) is int and axis > 0 for axis in axes):
        raise InvalidShape(
            f"the shape of {quoted(name)} must be a list of at most {MOST_AXES} whole numbers, 1 or more each"
        )
    return tuple(axes)


def _of_json(one: Described, data: Any) -> NDArray[Any]:
    """An input from its numbers in the JSON object, nested or flat."""
    name, shape, datatype, _ = one
    kind, told = READ_TYPES[datatype], quoted(name)[1:-1]
    numbers = _truths(data, told) if datatype == "BOOL" else numbers_of(data, told)
    if numbers.size != math.prod(shape) or (numbers.ndim > 1 and numbers.shape != shape):
        raise InvalidShape(
            f"the data of {told} are {numbers.size} numbers of shape {numbers.shape}, and its shape is {[*shape]}"
        )
    if kind.kind == "u" and datatype != "BF16":
        known = np.iinfo(kind)
        if numbers.size and not (np.floor(numbers) == numbers).all():
            raise InvalidValue(f"{told} is {datatype} and holds numbers that are not whole; send FP32")
        if numbers.size and (numbers.min() < known.min or numbers.max() > known.max):
            raise InvalidValue(f"{told} is {datatype} and holds numbers outside {known.min} to {known.max}")
        numbers = numbers.astype(kind)
    return numbers.reshape(shape)


def _truths(data: Any, name: str) -> NDArray[Any]:
    """Booleans, or 0 and 1, of any nesting, without objects that are kept meanwhile."""
    return np.fromiter(_each_truth(data, name, MOST_AXES), np.bool_)


def _each_truth(value: Any, name: str, axes: int) -> Iterator[bool]:
    if isinstance(value, simdjson.Array) and axes:
        for entry in value:
            yield from _each_truth(entry, name, axes - 1)
    elif isinstance(value, bool | int) and value in (0, 1):
        yield bool(value)
    else:
        raise InvalidShape(f"{name} is BOOL; its data must be lists of true and false, or of 1 and 0")


def write(answer: Answer, model: str, identity: str, asked: Head) -> tuple[Body, int | None]:
    """Write a response.

    Lists and arrays of the answer are its outputs, all else are parameters of the response.

    Args:
        answer: The answer.
        model: Name of the model, as the protocol has it.
        identity: Id of the response.
        asked: What was asked for.

    Returns:
        (body, bytes of the JSON object; None where it is the whole body).
    """
    described = {name: value for name, value in answer.about.items() if _is_tensor(name, value)}
    arrays = {name: np.asarray(value) for name, value in {**answer.outputs, **described}.items()}
    wanted = {name: asked.outputs.get(name, asked.binary) for name in asked.outputs or arrays if name in arrays}
    about = {name: value for name, value in answer.about.items() if name not in described and name not in HEAD}
    if "notes" in about:
        about["notes"] = orjson.dumps(about["notes"]).decode()
    head = {"model_name": model, "model_version": answer.about["version"], "id": identity, "parameters": about}
    text = bytearray(orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)[:-1])
    text += b',"outputs":['
    tails: list[Any] = []
    for name, binary in wanted.items():
        array = arrays[name]
        entry: dict[str, Any] = {"name": name, "shape": array.shape, "datatype": WRITTEN_TYPES[array.dtype.kind]}
        if binary:
            content = _bytes(array)
            entry["parameters"] = {"binary_data_size": len(content)}
            tails.append(content)
        text += b"," if text.endswith(b"}") else b""
        text += orjson.dumps(entry)[:-1]
        for piece in () if binary else _texts(array):
            text += piece
        text += b"}"
    text += b"]}"
    if not tails:
        return text, None
    size = len(text)
    for content in tails:
        text += content
    return text, size


def _is_tensor(name: str, value: Any) -> bool:
    return isinstance(value, np.ndarray | list) and name != "notes"


def _bytes(array: NDArray[Any]) -> memoryview | bytes:
    """The elements of an output as bytes; each text after its length."""
    kind = array.dtype.kind
    if kind == "f":
        return np.ascontiguousarray(array, FLOAT).reshape(-1).data.cast("B")
    if kind == "i":
        return array.astype("<i8").tobytes()
    texts = [str(value).encode() for value in array.ravel()]
    return b"".join(SIZE.pack(len(text)) + text for text in texts)


def _texts(array: NDArray[Any]) -> Iterator[bytes]:
    """The field `data` of an output, a flat list, in pieces."""
    flat = np.ascontiguousarray(array).reshape(-1)
    yield b',"data":'
    if array.dtype.kind == "f":
        yield from array_slices(flat)
    else:
        yield orjson.dumps(flat.tolist())
