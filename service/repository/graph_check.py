"""Checks an ONNX graph with protobuf before onnxruntime opens it: what it must not contain."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from functools import cache
from itertools import product
from types import MappingProxyType
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from service.contract.manifest import ManifestError, shown

MESSAGES: dict[str, dict[int, tuple[str, str]]] = {
    "Model": {7: ("graph", "Graph"), 20: ("training_info", "Training"), 25: ("functions", "Function")},
    "Graph": {1: ("node", "Node"), 5: ("initializer", "Tensor"), 15: ("sparse_initializer", "SparseTensor")},
    "Training": {1: ("initialization", "Graph"), 2: ("algorithm", "Graph")},
    "Function": {
        1: ("name", ""),
        7: ("node", "Node"),
        10: ("domain", ""),
        11: ("attribute_proto", "Attribute"),
    },
    "Node": {
        1: ("input", ""),
        3: ("name", ""),
        4: ("op_type", ""),
        5: ("attribute", "Attribute"),
        7: ("domain", ""),
    },
    "Attribute": {
        5: ("t", "Tensor"),
        6: ("g", "Graph"),
        10: ("tensors", "Tensor"),
        11: ("graphs", "Graph"),
        22: ("sparse_tensor", "SparseTensor"),
        23: ("sparse_tensors", "SparseTensor"),
    },
    "SparseTensor": {1: ("values", "Tensor"), 2: ("indices", "Tensor")},
    "Tensor": {8: ("name", ""), 13: ("external_data", "Entry"), 14: ("data_location", "number")},
    "Entry": {1: ("key", ""), 2: ("value", "")},
}
"""The fields of onnx.proto's messages that lead to tensors and nodes, by number: name and type ("" is text).

Every field is declared repeated, so that a message that occurs twice where one belongs is checked twice, not merged.
"""
OWN = {"", "ai.onnx", "ai.onnx.ml"}
"""Domains of ONNX's own operators. Operators of other domains may run code or read files, as EPContext does."""
RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
EXTERNAL = 1
"""A tensor's `data_location` where its data are in another file."""
INITIALISER = "/graph/initializer"
NUMBER = re.compile(r"[0-9]{1,12}", re.ASCII)
TRAINING_INPUT = 2
"""Index of Dropout's input that makes it draw random numbers."""


def check_graph(name: str, content: bytes, data: Mapping[str, int] = MappingProxyType({})) -> None:
    """Refuse a graph with data outside its files, with random operators, or with operators that are not ONNX's own.

    Subgraphs, attributes, sparse tensors, functions and training information are checked too.

    Args:
        name: Name of the graph in the message.
        content: The graph's file.
        data: Sizes of its files of external data, by name. Initialisers of the graph itself may lie there.

    Raises:
        ManifestError: The message names the tensor or the node.
    """
    if content[4:8] == b"ORTM":
        raise ManifestError(f"{name} is in onnxruntime's own format; export it as ONNX")
    try:
        model = _model_class().FromString(content)
    except DecodeError as error:
        raise ManifestError(f"{name} is not an ONNX graph; export the model again") from error
    functions = {(domain, of) for one in model.functions for domain in _texts(one.domain) for of in _texts(one.name)}
    waiting: list[tuple[str, Message]] = [("", model)]
    while waiting:
        place, message = waiting.pop()
        kind = message.DESCRIPTOR.name
        if kind == "Tensor":
            _check_tensor(name, message, data if place == INITIALISER else {})
        elif kind == "Node":
            _check_node(name, message, functions)
        for field, found in message.ListFields():
            waiting += ((f"{place}/{field.name}", part) for part in found if isinstance(part, Message))


def _check_tensor(name: str, tensor: Any, data: Mapping[str, int]) -> None:
    if not (tensor.external_data or any(tensor.data_location)):
        return
    where = f"{name}: tensor {shown(_last(tensor.name))} has its data outside the graph's file"
    entries = [(key, value) for entry in tensor.external_data for key in entry.key for value in entry.value]
    told = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in entries}
    file = told.get("location", "")
    if file not in data:
        raise ManifestError(
            f"{where}, where the manifest does not list it; list the file in the graph's `data`, or export the model "
            "with its weights inside"
        )
    numbers = [told.get("offset", "0"), told.get("length", "")]
    if (
        len(told) < len(tensor.external_data)
        or len(entries) > len(told)
        or told.keys() - {"location", "offset", "length"}
        or list(tensor.data_location) != [EXTERNAL]
        or not all(NUMBER.fullmatch(number) for number in numbers)
    ):
        raise ManifestError(f"{where}, but not by one location, offset and length; export the model again")
    offset, length = map(int, numbers)
    if offset + length > data[file]:
        raise ManifestError(
            f"{where}, up to byte {offset + length} of {file}, which has {data[file]}; export the model again"
        )


def _check_node(name: str, node: Any, functions: AbstractSet[tuple[str, str]]) -> None:
    """Check every value of a field: parsers take the last one where it occurs several times."""
    for domain, operator in product(_texts(node.domain), _texts(node.op_type)):
        where = f"{name}: node {shown(_last(node.name))} ({shown(operator)} of domain {shown(domain or 'ai.onnx')})"
        if domain not in OWN and (domain, operator) not in functions:
            raise ManifestError(f"{where} is not an operator of ONNX; export the model as plain ONNX")
        if operator in RANDOM or (operator == "Dropout" and any(node.input[TRAINING_INPUT:])):
            raise ManifestError(f"{where} draws random numbers; feed noise as an input, and export in evaluation mode")


def _texts(found: Iterable[bytes]) -> list[str]:
    """Return the values of a text field; an absent field is one empty text."""
    return [value.decode(errors="replace") for value in found] or [""]


def _last(found: Iterable[bytes]) -> str:
    return _texts(found)[-1]


@cache
def _model_class() -> Any:
    """Return a protobuf message class of `MESSAGES`; it skips all other fields."""
    file = FileDescriptorProto(name="vae_graph.proto", package="vae_graph", syntax="proto2")
    kinds = {"": FieldDescriptorProto.TYPE_BYTES, "number": FieldDescriptorProto.TYPE_INT32}
    for message, fields in MESSAGES.items():
        described = file.message_type.add(name=message)
        for number, (field, kind) in fields.items():
            described.field.add(
                name=field,
                number=number,
                label=FieldDescriptorProto.LABEL_REPEATED,
                type=kinds.get(kind, FieldDescriptorProto.TYPE_MESSAGE),
                type_name=None if kind in kinds else f".vae_graph.{kind}",
            )
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return GetMessageClass(pool.FindMessageTypeByName("vae_graph.Model"))
