"""What is not an operation: models, health, metrics, documentation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from service.repository.repository import Condition, Repository
from service.settings import Settings

OPERATIONS = [
    "encode",
    "decode",
    "reconstruct",
    "denoise",
    "inpaint",
    "super-resolve",
    "score",
    "sample",
    "interpolate",
    "traverse",
]


def test_models_are_described_for_people(client: httpx.Client) -> None:
    """Shapes, range, prior, likelihood, operations, measured quality, fingerprint."""
    listed = client.get("/v1/models").json()["models"]
    (one,) = listed
    assert one == client.get("/v1/models/digits").json() == client.get("/v1/models/digits/versions/1").json()
    assert one["input_shape"] == [1, 8, 8]
    assert one["latent_dim"] == 8
    assert one["operations"] == OPERATIONS
    assert one["quality"]["test_elbo_nats"] < 0
    assert len(one["fingerprint"]) == 16


def test_an_unknown_model_is_a_problem(client: httpx.Client) -> None:
    """With the names there are."""
    response = client.get("/v1/models/nobody")
    assert (response.status_code, response.json()["code"]) == (404, "unknown_model")
    assert "digits" in response.json()["detail"]


def test_health(client: httpx.Client) -> None:
    """Alive and ready."""
    assert client.get("/health/live").json() == {"live": True}
    assert client.get("/health/ready").json() == {"ready": True, "models": ["digits"]}


def test_ready_is_false_without_models_or_engine() -> None:
    """Zero models are not ready, and neither is a service that is stopping."""

    async def scenario() -> None:
        app = create_app(Settings(), Repository({}, ""))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as empty:
            response = await empty.get("/health/ready")
            assert (response.status_code, response.json()["code"]) == (503, "not_ready")

    asyncio.run(scenario())


def test_metrics_count_requests_rows_and_batches(client: httpx.Client) -> None:
    """By model, operation and outcome; labels are bounded."""
    client.post("/v1/sample?count=3")
    client.post("/v1/sample?count=0")
    client.post("/v1/models/nobody-at-all/sample")
    text = client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    outcomes = {s.labels["outcome"] for s in families["vae_requests"].samples if s.labels["operation"] == "sample"}
    assert {"ok", "invalid_option", "unknown_model"} <= outcomes
    assert "nobody-at-all" not in text
    assert {"vae_rows", "vae_queue_seconds", "vae_inference_seconds", "vae_batch_rows", "vae_queued_rows"} <= set(
        families
    )


def test_every_endpoint_is_documented_with_an_example(client: httpx.Client) -> None:
    """OpenAPI names bodies, options, answers and problems of every operation on every path."""
    paths = client.get("/openapi.json").json()["paths"]
    for operation in OPERATIONS:
        for prefix in ("/v1", "/v1/models/{model}", "/v1/models/{model}/versions/{version}"):
            post = paths[f"{prefix}/{operation}"]["post"]
            assert "example" in post["requestBody"]["content"]["application/json"]
            assert "example" in post["responses"]["200"]["content"]["application/json"]
            assert {"400", "404", "406", "413", "415", "422", "500", "503", "504"} <= set(post["responses"])
    denoise = {p["name"]: p for p in paths["/v1/denoise"]["post"]["parameters"]}
    assert set(denoise) == {
        "fit",
        "draws",
        "seed",
        "noise",
        "level",
        "quality",
        "uncertainty",
        "completions",
        "preview",
        "blur",
        "scale",
    }
    assert all(parameter["description"] for parameter in denoise.values())
    for path, methods in paths.items():
        if "get" in methods:
            (content,) = (form for form in methods["get"]["responses"]["200"]["content"].values() if "example" in form)
            assert content["example"], path
    assert client.get("/docs").status_code == 200


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object within a document."""
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from parts(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from parts(value)


def test_the_document_is_complete_enough_for_generators(client: httpx.Client) -> None:
    """Arrays say of what, fields have a type and a description, references lead somewhere, problems are one schema."""
    document = client.get("/openapi.json").json()
    paths = {path: item for path, item in document["paths"].items() if path.rpartition("/")[2] in OPERATIONS}
    assert len(paths) == 3 * len(OPERATIONS)
    schemas = document["components"]["schemas"]
    for part in parts([paths, schemas]):
        if part.get("type") == "array":
            assert part["items"], part
        if "$ref" in part:
            _, _, kind, name = part["$ref"].split("/")
            assert name in document["components"][kind]
    for name in (name for name in schemas if name.endswith(("Request", "Answer", "Form", "Fields", "Note", "Problem"))):
        for field, schema in schemas[name]["properties"].items():
            assert schema.keys() & {"type", "anyOf", "$ref"}, (name, field)
            assert "description" in schema or "$ref" in schema, (name, field)
    for item in paths.values():
        for status, answer in item["post"]["responses"].items():
            content = answer["content"]
            schema = str((content.get("application/json") or content["application/problem+json"])["schema"])
            name = "Problem" if status != "200" else "Answer"
            assert schema.endswith(f"{name}'}}"), status


def test_a_service_whose_engine_has_stopped_says_so(digits_models: Path) -> None:
    """Readiness and requests are 503 with Retry-After."""

    async def scenario() -> None:
        app = create_app(Settings(models=digits_models))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as one:
            async with app.router.lifespan_context(app):
                assert (await one.get("/health/ready")).status_code == 200
            for response in (await one.get("/health/ready"), await one.post("/v1/sample")):
                assert (response.status_code, response.json()["code"]) == (503, "not_ready")
                assert int(response.headers["retry-after"]) > 0

    asyncio.run(scenario())


def test_readiness_of_a_model(client: httpx.Client) -> None:
    """Of its latest version that is served and of each one; names that nobody knows are 404."""
    for path in ("/v1/models/digits/ready", "/v1/models/digits/versions/1/ready"):
        assert client.get(path).json() == {"ready": True, "model": "digits", "version": "1"}
        assert client.head(path).status_code == 200
    for path in ("/v1/models/nobody/ready", "/v1/models/digits/versions/2/ready", "/v1/models/nobody/versions/1/ready"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")
        assert client.head(path).status_code == 404


def test_a_model_that_is_not_served_is_not_ready(small: Repository) -> None:
    """503 with the reason of each version; a version beside it that is served makes the model ready, not itself."""

    async def scenario() -> None:
        model = small.find("mnist-2d", None)
        repository = Repository({"mnist-2d": {"1": model}}, "mnist-2d")
        repository.conditions = {
            "mnist-2d": {"1": Condition("ready"), "2": Condition("failed", "not a graph")},
            "other": {"1": Condition("unloaded", "unloaded by request")},
        }
        transport = httpx.ASGITransport(create_app(Settings(), repository))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as one:
            assert (await one.get("/v1/models/mnist-2d/ready")).json()["version"] == "1"
            for path, reason in (
                ("mnist-2d/versions/2", "version 2 is failed: not a graph"),
                ("other", "version 1 is unloaded: unloaded by request"),
                ("other/versions/1", "version 1 is unloaded: unloaded by request"),
            ):
                answer = await one.get(f"/v1/models/{path}/ready")
                assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
                assert answer.json()["detail"] == reason
                assert answer.headers["retry-after"] == "1"
            assert (await one.get("/v1/models/other/versions/7/ready")).status_code == 404

    asyncio.run(scenario())
