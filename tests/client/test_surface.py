"""The client has all that the service has, and no more: operations, options, outputs, paths and problems."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import httpx
import pytest

from service.api import problems
from service.errors import CallerGone, ReaderFault
from vae_client import Answer, AsyncClient, Client
from vae_client.answer import NOT_ARRAYS, Output
from vae_client.client import AsyncStream, Stream
from vae_client.errors import BY_CODE, OtherProblem, problem_of
from vae_client.operations import NAMES, Administration, Operations, method_of, options_of

FAMILIES = {"integer": int, "number": float, "string": str, "boolean": bool}
DEFAULT = re.compile(r" Default: (.+)\.$")


@pytest.fixture(scope="module")
def document(address: str) -> dict[str, Any]:
    """The OpenAPI document."""
    return dict(httpx.get(f"{address}/openapi.json", timeout=60).json())


def resolved(schema: Mapping[str, Any], document: dict[str, Any]) -> list[Mapping[str, Any]]:
    """The alternatives of a schema, without references."""
    found = []
    for one in schema.get("anyOf", [schema]):
        name = one.get("$ref", "").rpartition("/")[2]
        found.append(document["components"]["schemas"][name] if name else one)
    return found


def of_schema(schema: Mapping[str, Any], document: dict[str, Any]) -> tuple[set[type], set[str]]:
    """(types, words) that an option may be."""
    parts = resolved(schema, document)
    words = {word for one in parts for word in one.get("enum", [one["const"]] if "const" in one else [])}
    return {FAMILIES[one["type"]] for one in parts if not {"enum", "const"} & one.keys()}, words


def of_hint(hint: Any) -> tuple[set[type], set[str]]:
    """The same of an annotation; None is an option that is left out."""
    parts = [hint] if get_origin(hint) is Literal or not get_args(hint) else get_args(hint)
    words = {word for one in parts if get_origin(one) is Literal for word in get_args(one)}
    return {one for one in parts if isinstance(one, type) and one is not type(None)}, words


def test_its_operations_are_those_of_the_service(document: dict[str, Any]) -> None:
    """In every path, and none besides."""
    served = {path.removeprefix("/v1/") for path in document["paths"] if re.fullmatch(r"/v1/[a-z-]+", path)}
    assert served - {"models"} == set(NAMES)


@pytest.mark.parametrize("operation", NAMES)
def test_every_option_is_there_with_its_type_and_default(operation: str, document: dict[str, Any]) -> None:
    """Names, type families, words and defaults are those of OpenAPI; nothing is extra."""
    parameters = document["paths"][f"/v1/{operation}"]["post"]["parameters"]
    served = {one["name"]: one for one in parameters if one["in"] == "query"}
    known = options_of(operation)
    assert known.keys() == served.keys()
    for name, one in served.items():
        assert of_hint(known[name].annotation) == of_schema(one["schema"], document), name
        told = DEFAULT.search(one["description"])
        default = known[name].default
        said = "null" if default is None else str(default).lower()
        assert said == ("null" if told is None else told[1].strip('"')), name


@pytest.mark.parametrize("operation", NAMES)
def test_every_input_is_an_argument(operation: str, document: dict[str, Any]) -> None:
    """Images, latents and masks are arguments of the operations that take them."""
    name = "".join(part.capitalize() for part in operation.split("-"))
    request = document["components"]["schemas"][f"{name}Request"]["properties"]
    arguments = set(method_of(operation).__annotations__) - {"common", "return"} - options_of(operation).keys()
    names = {"between": "latents"}
    assert {names.get(one, one) for one in arguments} == request.keys() - options_of(operation).keys()


def test_every_output_is_an_attribute_of_an_answer(document: dict[str, Any]) -> None:
    """Arrays and all other fields of every answer in JSON."""
    schemas = document["components"]["schemas"]
    fields = {field for name in schemas if name.endswith("Answer") for field in schemas[name]["properties"]}
    arrays = {name for name, value in vars(Answer).items() if isinstance(value, Output)}
    assert len(fields) > 15
    assert fields == arrays | NOT_ARRAYS
    assert set(Answer.__dataclass_fields__) >= NOT_ARRAYS


def test_every_other_path_has_a_method(document: dict[str, Any]) -> None:
    """Of `/v1` and of health, but for pictures of cards, which are for browsers."""
    paths: set[str] = set()

    class Asked(Administration[None, None]):
        def _json(self, call: Any) -> None:
            paths.add(f"{call.method} {call.path}")

        _text = _json

    asked = Asked()
    asked.models(), asked.live(), asked.ready()
    for version in (None, "{version}"):
        for method in (asked.model, asked.card, asked.load, asked.unload, asked.ready):
            method("{model}", version)
    found = {path.replace("%7B", "{").replace("%7D", "}") for path in paths}
    served = {f"{verb.upper()} {path}" for path, verbs in document["paths"].items() for verb in verbs}
    operations = {one for one in served if one.rpartition("/")[2] in NAMES}
    ours = {one for one in served - operations if re.match(r"(GET|POST) /(v1|health)/", one)}
    assert found == {one for one in ours if not one.endswith("/card/{file}")}


def test_every_problem_has_its_exception() -> None:
    """Each code that the service can send is that of one exception type, whose status is the service's."""
    internal = {"caller_gone"}
    sent = {kind.code: status for kind, status in problems.STATUS.items() if kind not in (CallerGone, ReaderFault)}
    sent |= {"internal_error": 500, "method_not_allowed": 405, "http_error": 418}
    assert sent.keys() - internal == BY_CODE.keys()
    for code, status in sent.items():
        error = problem_of(status, {"content-type": problems.MEDIA_TYPE}, problems.problem(status, code, "why")[0])
        assert (type(error), error.code, error.status, str(error)) == (BY_CODE[code], code, status, "why")


def test_an_unknown_code_is_a_problem_too() -> None:
    """A newer service, or a proxy that knows nothing of problems."""
    newer = problem_of(422, {"content-type": problems.MEDIA_TYPE}, problems.problem(422, "brand_new", "why")[0])
    proxy = problem_of(502, {"content-type": "text/html"}, b"<html>Bad Gateway</html>")
    assert type(newer) is type(proxy) is OtherProblem
    assert str(newer) == "why"
    assert "502" in str(proxy)
    assert "Bad Gateway" in str(proxy)


@pytest.mark.parametrize("kind", [Client, AsyncClient, Stream, AsyncStream])
def test_all_clients_share_the_methods(kind: type) -> None:
    """No client has a copy of an operation of its own, so that none can differ."""
    for operation in NAMES:
        name = operation.replace("-", "_")
        assert getattr(kind, name) is getattr(Operations, name)
