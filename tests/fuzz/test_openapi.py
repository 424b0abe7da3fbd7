"""Requests made up from the OpenAPI document: what it promises is what is answered, to right ones and wrong ones."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from service.app import create_app
from service.settings import Settings
from tests.service.conftest import serving

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "3"))
"""Of each operation, right ones and as many wrong ones."""
SEED = int(os.environ.get("FUZZ_SEED", "1"))
EXCLUDED = [positive_data_acceptance]  # what fits the document may still have another shape than the model's images
IMAGE = {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "minItems": 8, "maxItems": 8}
SHAPES = {
    "images": {"type": "array", "items": {**IMAGE, "items": IMAGE}, "minItems": 2, "maxItems": 2},
    "mask": {"type": "array", "items": {**IMAGE, "items": IMAGE}, "minItems": 1, "maxItems": 1},
    "latents": {"type": "array", "items": IMAGE, "minItems": 2, "maxItems": 2},
}
"""What the document cannot know of arrays, for the model of 8 x 8 pixels and 8 latents."""
BOUNDS = {"count": 16, "size": 4, "steps": 8, "draws": 4}


@pytest.fixture(scope="module")
def url(digits_models: Path) -> Iterator[str]:
    """A service with limits that keep its work short."""
    with serving(create_app(Settings(models=digits_models, max_rows=8, max_request_rows=256, max_draws=8))) as url:
        yield url


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    """What it says of itself."""
    return httpx.get(f"{url}/openapi.json").json()


def outcomes(document: dict[str, Any], url: str, modes: tuple[GenerationMode, ...]) -> Counter[int]:
    """Statuses of requests made up from it, each checked against it."""
    schema, statuses = schemathesis.openapi.from_dict(document), Counter[int]()
    for found in schema.get_all_operations():
        for mode in modes:
            ask_all(url, found.ok().as_strategy(generation_mode=mode), statuses)
    return statuses


def ask_all(url: str, cases: Any, statuses: Counter[int]) -> None:
    @seed(SEED)
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases)
    def ask(case: Any) -> None:
        answer = case.call(base_url=url, timeout=60)
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        case.validate_response(answer, excluded_checks=EXCLUDED)

    with suppress(Unsatisfiable):  # nothing can be wrong about a GET without parameters
        ask()


def test_what_the_document_allows_and_what_it_does_not(url: str, document: dict[str, Any]) -> None:
    """Every status, media type, header and body is a documented one; wrong requests are refused; never an error."""
    paths = {
        path: item for path, item in document["paths"].items() if "{" not in path or "encode" in path or "get" in item
    }
    statuses = outcomes({**document, "paths": paths}, url, (GenerationMode.POSITIVE, GenerationMode.NEGATIVE))
    assert statuses.total() > 5 * EXAMPLES


def test_requests_of_the_models_own_shapes_are_answered(url: str, document: dict[str, Any]) -> None:
    """With the shapes filled in, most are right ones, and their answers are as documented."""
    operations = {path: item for path, item in document["paths"].items() if path.count("/") == 2 and "post" in item}
    assert len(operations) == 10
    schemas = document["components"]["schemas"]
    paths = {path: {"post": shaped(item["post"], schemas)} for path, item in operations.items()}
    statuses = outcomes({**document, "paths": paths}, url, (GenerationMode.POSITIVE,))
    assert statuses[200] > 0.5 * statuses.total(), statuses


def shaped(operation: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """An operation asked in JSON alone, its arrays and numbers within what this model and these limits take."""
    body = schemas[operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]]
    given = bounded(body["properties"])
    properties = {name: SHAPES.get(name, schema) if "$ref" in schema else schema for name, schema in given}
    arrays = [name for name in ("images", "latents") if name in properties][:1]
    content = {"schema": {**body, "properties": properties, "required": arrays}}
    return {**operation, "parameters": [], "requestBody": {"required": True, "content": {"application/json": content}}}


def bounded(properties: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Without what only goes with other options, other models, or picture files."""
    for name, schema in properties.items():
        if name in BOUNDS:
            yield name, {**schema, "maximum": BOUNDS[name]}
        elif name == "axes":
            yield name, {"enum": ["0", "1,7"]}
        elif name == "factor":
            yield name, {"enum": [2, 4, 8]}
        elif name not in ("completions", "blur", "binarise", "channels", "scale"):
            yield name, schema
