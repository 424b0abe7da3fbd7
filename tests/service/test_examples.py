"""Examples of the OpenAPI document: every body has one, each fits its schema, and the service answers as they say."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import orjson
import pytest
from fastapi import FastAPI
from jsonschema import Draft202012Validator

from service.api.problems import STATUS
from service.app import create_app
from service.operations.examples import OTHER
from service.operations.registry import OPERATIONS
from service.settings import Settings

MODELS = Path(__file__).parents[2] / "models"
FORM, FIELDS, JSON = "multipart/form-data", "application/x-www-form-urlencoded", "application/json"
NAMES = [operation.name for operation in OPERATIONS]
METHODS = {"get", "post", "put", "delete", "patch", "head", "options", "trace"}


class Body(NamedTuple):
    """A body that the document describes."""

    place: str
    media_type: str
    content: dict[str, Any]


@pytest.fixture(scope="module")
def client(serve: Callable[[FastAPI], AbstractContextManager[str]]) -> Iterator[httpx.Client]:
    """A client of a service of the included digits."""
    app = create_app(Settings(models=MODELS, versions="mnist:latest", default_model="mnist", threads=1))
    with serve(app) as url, httpx.Client(base_url=url, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    """The OpenAPI document."""
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def bodies(document: dict[str, Any]) -> Iterator[Body]:
    """Every body of every request and answer."""
    for path, item in document["paths"].items():
        for method in item.keys() & METHODS:
            operation = item[method]
            for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
                yield Body(f"{method} {path}", media_type, content)
            for status, response in operation["responses"].items():
                for media_type, content in response.get("content", {}).items():
                    yield Body(f"{method} {path} {status}", media_type, content)


def examples(document: dict[str, Any], content: dict[str, Any]) -> list[dict[str, Any]]:
    """The examples of a body."""
    found = [{"value": content["example"]}] if "example" in content else []
    for one in content.get("examples", {}).values():
        name = one.get("$ref", "").rpartition("/")[2]
        found.append(document["components"]["examples"][name] if name else one)
    return found


def test_every_body_has_an_example(document: dict[str, Any]) -> None:
    """Of every path, method, status and media type."""
    assert [body[:2] for body in bodies(document) if not examples(document, body.content)] == []


def test_every_example_fits_its_schema(document: dict[str, Any]) -> None:
    """By JSON Schema."""

    def fits(value: Any, schema: dict[str, Any]) -> bool:
        whole = {**schema, "components": document["components"]}
        return Draft202012Validator(whole).is_valid(value)

    assert [
        body[:2]
        for body in bodies(document)
        for one in examples(document, body.content)
        if not fits(one["value"], body.content.get("schema", {}))
    ] == []
    assert not fits({"images": 3}, {"$ref": "#/components/schemas/EncodeRequest"})


def operation_at(document: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = document["paths"][f"/v1/{name}"]["post"]
    return found


def request(document: dict[str, Any], content: dict[str, Any], media_type: str) -> dict[str, Any]:
    """httpx's arguments for a request as the example shows it."""
    if media_type == JSON:
        return {"json": content["example"]}
    if media_type == FORM:
        fields = {name: value for name, value in content["example"].items() if name not in ("file", "mask")}
        files = [(name, file) for name in ("file", "mask") for file in content["example"].get(name, ())]
        parts = [(name, (file, file_named(document, file))) for name, file in files]
        return {"data": fields, "files": parts or None}
    if media_type == FIELDS:
        return {"data": content["example"]}
    return {"content": file_of(document, content), "headers": {"content-type": media_type}}


def file_of(document: dict[str, Any], content: dict[str, Any]) -> bytes:
    """The body that is an example in base64."""
    (example,) = examples(document, content)
    return base64.b64decode(example["value"], validate=True)


def file_named(document: dict[str, Any], name: str) -> bytes:
    """What the example of a form calls so."""
    if name == "latents.npy":
        return file_of(document, operation_at(document, "decode")["requestBody"]["content"]["application/x-npy"])
    return base64.b64decode(OTHER) if name == "other.png" else (MODELS.parent / "examples" / name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_answered(client: httpx.Client, document: dict[str, Any], name: str) -> None:
    """In every media type; the answer in JSON has the fields of its example, and no others."""
    operation = operation_at(document, name)
    expected = operation["responses"]["200"]["content"][JSON]["example"]
    for media_type, content in operation["requestBody"]["content"].items():
        sent = request(document, content, media_type)
        headers = sent.pop("headers", {}) | {"accept": JSON}
        answer = client.post(f"/v1/models/mnist/{name}", headers=headers, **sent)
        assert answer.status_code == 200, (media_type, answer.text)
        if media_type == JSON:
            assert answer.json().keys() - {"notes"} == expected.keys()


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_written(client: httpx.Client, document: dict[str, Any], name: str) -> None:
    """In every media type that the document lists, and as the example begins."""
    operation = operation_at(document, name)
    asked = operation["requestBody"]["content"]
    media_type = next(one for one in ("application/x-npy", "image/png", FIELDS) if one in asked)
    for accepted, content in operation["responses"]["200"]["content"].items():
        sent = request(document, asked[media_type], media_type)
        headers = sent.pop("headers", {}) | {"accept": accepted}
        answer = client.post(f"/v1/models/mnist/{name}", headers=headers, **sent)
        assert answer.status_code == 200, (accepted, answer.text)
        assert answer.headers["content-type"].partition(";")[0] == accepted
        if accepted == "application/x-ndjson":
            written = [orjson.loads(line) for line in content["example"].splitlines()]
            assert orjson.loads(answer.content.splitlines()[-1])["event"] == written[-1]["event"]
        elif "examples" in content and accepted != "application/octet-stream":
            assert answer.content[:4] == file_of(document, content)[:4]


def test_models_are_described_as_the_examples_say(client: httpx.Client, document: dict[str, Any]) -> None:
    """The answers of every other GET in JSON have the fields of their examples."""
    for path, item in document["paths"].items():
        content = item.get("get", {}).get("responses", {}).get("200", {}).get("content", {}).get(JSON)
        if content:
            answer = client.get(path.format(model="mnist", version="3"))
            assert answer.status_code == 200
            found = {name for name, value in answer.json().items() if value is not None}  # FastAPI leaves null out
            assert found == content["example"].keys(), path


def test_problems_are_as_their_examples(client: httpx.Client, document: dict[str, Any]) -> None:
    """Every code has an example; those that a request can cause have its status, title and type."""
    known = document["components"]["examples"]
    assert known.keys() >= {kind.code for kind, status in STATUS.items() if status != 499}
    caused = [
        client.post("/v1/encode", content=b"{", headers={"content-type": JSON}),
        client.post("/v1/models/minst/encode", json={}),
        client.post("/v1/encode", content=b"x", headers={"content-type": "text/plain"}),
        client.post("/v1/encode", json={"images": [[[1.5] * 28] * 28]}),
        client.post("/v1/encode", json={"images": [[[0.5] * 27] * 28]}),
        client.post("/v1/sample", json={"count": 1}, headers={"accept": "text/html"}),
        client.post("/v1/sample?count=0"),
        client.post("/v1/models/mnist/load"),
        client.get("/health/live", headers={"host": "evil.example"}),
        client.post("/v1/decode", json={"latents": [[0.0] * 40], "fingerprint": "0123456789abcdef"}),
        client.get("/v1/models/mnist/card/photo.png"),
    ]
    codes = {answer.json()["code"] for answer in caused}
    assert len(codes) == len(caused)
    for answer in caused:
        found = answer.json()
        example = known[found["code"]]["value"]
        assert {**example, "detail": found["detail"]} == found
        assert answer.status_code == example["status"]
