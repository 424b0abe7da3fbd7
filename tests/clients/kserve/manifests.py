"""Objects for KServe as JSON on standard input, checked by the models of the package `kserve`; prints what is wrong.

KServe's models hold KServe's fields; what a pod is made of, they take from the package `kubernetes`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import kserve.models
import kubernetes.client

PLAIN = {"str": str, "int": int, "bool": bool, "ResourceQuantity": (str, int)}
KINDS = {"ServingRuntime": "V1alpha1ServingRuntime", "InferenceService": "V1beta1InferenceService"}


def problems(kind: str, value: Any, path: str) -> Iterator[str]:
    """Yield what is wrong with a value: unknown fields, missing ones, and values of another type.

    Args:
        kind: Its type, as the models write it.
        value: The value, as JSON gives it.
        path: Where it is.
    """
    many = re.fullmatch(r"list\[(.*)\]|dict\(str, (.*)\)", kind)
    if many:
        if not isinstance(value, list if many[1] else dict):
            yield f"{path} must be {kind}"
            return
        for key, one in enumerate(value) if many[1] else value.items():
            yield from problems(many[1] or many[2], one, f"{path}.{key}")
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (isinstance(value, bool) and kind != "bool"):
            yield f"{path} must be {kind}"
    elif hasattr(kserve.models, kind):
        yield from of_kserve(getattr(kserve.models, kind), value, path)
    elif hasattr(kubernetes.client, kind):
        yield from of_kubernetes(getattr(kubernetes.client, kind), value, path)
    else:
        yield f"{path}: no model {kind}"


def of_kserve(model: Any, value: dict[str, Any], path: str) -> Iterator[str]:
    """Yield what is wrong with an object that a model of KServe describes."""
    fields = {alias: name for name, alias in model.attribute_map.items()}
    if unknown := value.keys() - fields.keys():
        yield f"{path} has no {', '.join(sorted(unknown))}"
        return
    for alias, one in value.items():
        yield from problems(model.openapi_types[fields[alias]], one, f"{path}.{alias}")
    try:
        model(**{fields[alias]: one for alias, one in value.items()})
    except ValueError as error:
        yield f"{path}: {error}"


def of_kubernetes(model: Any, value: dict[str, Any], path: str) -> Iterator[str]:
    """Yield what is wrong with an object that a model of Kubernetes describes; unknown fields do not come back."""
    try:
        back = kubernetes.client.ApiClient().sanitize_for_serialization(model.from_dict(value))
    except ValueError as error:
        yield f"{path}: {error}"
        return
    if back != value:
        yield f"{path} is {json.dumps(value)}, of which the model keeps {json.dumps(back)}"


for each in json.load(sys.stdin):
    for problem in problems(KINDS[each["kind"]], each, each["metadata"]["name"]):
        sys.stdout.write(f"{problem}\n")
