"""The Open Inference Protocol below `/v2`: its bytes, its names, and what it refuses. No client of others is needed."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray

from service.app import create_app
from service.errors import StartError
from service.repository.repository import Repository
from service.repository.version import read_manifest
from service.settings import Settings
from tests.support.versions import conditional_version, free_version, ladder_version, opened

HEAD = "inference-header-content-length"
ALICE, OPS = "alice-0123456789abcdef", "ops-0123456789abcdef"
Z = np.linspace(-1, 1, 6, dtype="<f4").reshape(3, 2)
DECODE = "/v2/models/mnist-2d.decode/infer"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, small: Repository) -> Repository:
    """`mnist-2d`; `photo`, a conditional model, and `free`, both for grey and colour of any size; a ladder."""
    folder = tmp_path_factory.mktemp("kinds")
    models = [
        opened(conditional_version(folder / "photo" / "1")),
        opened(free_version(folder / "free" / "2", (3, 1))),
        opened(ladder_version(folder / "ladder" / "1")),
    ]
    made = {model.manifest.name: {model.manifest.version: model} for model in models}
    return Repository({**small.models, **made}, "mnist-2d")


@pytest.fixture(scope="module")
def app(repository: Repository) -> FastAPI:
    """The service around them."""
    return create_app(Settings(), repository)


def asked(app: FastAPI, *requests: tuple[Any, ...]) -> list[httpx.Response]:
    """Answers to (path, arguments of httpx) one after the other; GET where no body is sent."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            found = []
            for path, *further in requests:
                arguments = dict(*further)
                method = "POST" if arguments.keys() & {"content", "json"} else "GET"
                found.append(await client.request(arguments.pop("method", method), path, **arguments))
            return found

    return asyncio.run(run())


def told(answer: httpx.Response, status: int) -> str:
    """The message of an error, whose body holds nothing else."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    content = answer.json()
    assert content.keys() == {"error"}
    return content["error"]


def tensor(name: str, array: NDArray[Any], datatype: str = "FP32", **further: Any) -> dict[str, Any]:
    return {"name": name, "shape": [*array.shape], "datatype": datatype, **further}


def binary(*tensors: tuple[str, NDArray[Any], str], **fields: Any) -> dict[str, Any]:
    """The arguments of a request whose inputs are bytes."""
    inputs = [tensor(name, array, kind, parameters={"binary_data_size": array.nbytes}) for name, array, kind in tensors]
    text = json.dumps({"inputs": inputs, **fields}).encode()
    return {
        "content": text + b"".join(array.tobytes() for _, array, _ in tensors),
        "headers": {HEAD: str(len(text))},
    }


def outputs(answer: httpx.Response) -> dict[str, NDArray[Any]]:
    """Outputs by name, whose bytes follow the JSON object in its order and fill the rest."""
    assert answer.status_code == 200, answer.text
    head = answer.headers.get(HEAD)
    text, rest = (answer.content, b"") if head is None else (answer.content[: int(head)], answer.content[int(head) :])
    kinds = {"FP32": "<f4", "INT64": "<i8"}
    found: dict[str, NDArray[Any]] = {}
    for output in json.loads(text)["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        assert (size is None) == ("data" in output)
        if size is None:
            found[output["name"]] = np.array(output["data"]).reshape(output["shape"])
            continue
        content, rest = rest[:size], rest[size:]
        if output["datatype"] == "BYTES":
            texts = []
            while content:
                length = int.from_bytes(content[:4], "little")
                texts, content = [*texts, content[4 : 4 + length].decode()], content[4 + length :]
            found[output["name"]] = np.array(texts).reshape(output["shape"])
        else:
            found[output["name"]] = np.frombuffer(content, kinds[output["datatype"]]).reshape(output["shape"])
    assert not rest
    media_type = "application/json" if head is None else "application/octet-stream"
    assert answer.headers["content-type"] == media_type
    return found


def npy(array: NDArray[Any]) -> dict[str, Any]:
    """The arguments of a request of `/v1`."""
    file = io.BytesIO()
    np.save(file, array)
    kind = "application/x-npy"
    return {"content": file.getvalue(), "headers": {"content-type": kind, "accept": kind}}


def loaded(answer: httpx.Response) -> NDArray[Any]:
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))


def test_bytes_go_in_and_out(app: FastAPI) -> None:
    """The numbers of `/v1`; the JSON object has names, shapes, sizes, the caller's id and what describes the answer."""
    request = binary(("latents", Z, "FP32"), id="mine", parameters={"binary_data_output": True})
    answer, known = asked(app, (DECODE, request), ("/v1/decode", npy(Z)))
    images = loaded(known)
    np.testing.assert_array_equal(outputs(answer)["images"], images)
    head = json.loads(answer.content[: int(answer.headers[HEAD])])
    fingerprint = known.headers["x-fingerprint"]
    assert head == {
        "model_name": "mnist-2d.decode",
        "model_version": "1",
        "id": "mine",
        "parameters": {"fingerprint": fingerprint},
        "outputs": [tensor("images", images, parameters={"binary_data_size": images.nbytes})],
    }
    assert answer.headers["x-fingerprint"] == fingerprint


@pytest.mark.parametrize("nested", [True, False])
def test_json_goes_in_and_out(app: FastAPI, nested: bool) -> None:
    """Numbers may be nested or flat; those of the answer are flat. The id is by default that of the request."""
    data = Z.tolist() if nested else Z.ravel().tolist()
    answer, known = asked(
        app, (DECODE, {"json": {"inputs": [tensor("latents", Z, data=data)]}}), ("/v1/decode", npy(Z))
    )
    np.testing.assert_array_equal(outputs(answer)["images"].astype("<f4"), loaded(known))
    content = answer.json()
    assert isinstance(content["outputs"][0]["data"][0], float)
    assert content["id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("FP64", "<f8"), ("FP16", "<f2"), ("UINT8", "u1"), ("BOOL", "?"), ("BF16", "<u2")]
)
def test_other_types_are_read_as_v1_reads_them(app: FastAPI, kind: str, dtype: str) -> None:
    """Levels are divided by 255; the upper halves of float32 are BF16. In JSON they are the same numbers."""
    levels = np.random.default_rng(1).integers(0, 256, (2, 3, 8, 8))
    x = levels.astype(dtype) if kind == "UINT8" else (levels > 99) if kind == "BOOL" else levels / np.float32(255)
    sent, plain = x.astype(dtype), x
    if kind == "BF16":
        sent = (x.astype("<f4").view("<u4") >> 16).astype(dtype)
        plain = (sent.astype("<u4") << 16).view("<f4")
    elif kind == "FP16":
        plain = sent.astype("<f4")
    path = "/v2/models/free.encode/infer"
    inputs = [tensor("images", plain, kind, data=plain.tolist())]
    wanted = [{"name": "mean"}]
    of_bytes, of_json, known = asked(
        app,
        (path, binary(("images", sent, kind), outputs=wanted)),
        (path, {"json": {"inputs": inputs, "outputs": wanted}}),
        ("/v1/models/free/encode", npy(sent if kind in ("UINT8", "BOOL") else plain.astype("<f4"))),
    )
    mean = loaded(known)[:, 0]
    np.testing.assert_allclose(outputs(of_bytes)["mean"], mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(outputs(of_json)["mean"], mean, rtol=1e-6, atol=1e-6)


def test_bfloat16_of_a_large_picture_is_no_16_bit_level(repository: Repository) -> None:
    """Pictures above VAE_TILE_PIXELS keep integer levels, and BF16 lies in 16-bit words."""
    x = (np.random.default_rng(4).random((1, 3, 96, 96), dtype="<f4").view("<u4") >> 16).astype("<u2")
    plain = (x.astype("<u4") << 16).view("<f4")
    path = "/v2/models/free.encode/infer"
    app = create_app(Settings(tile_pixels=64 * 64), repository)
    one, other = asked(app, (path, binary(("images", x, "BF16"))), (path, binary(("images", plain, "FP32"))))
    np.testing.assert_array_equal(outputs(one)["mean"], outputs(other)["mean"])


@pytest.mark.parametrize("repeated", [False, True])
def test_a_repeated_head_is_read_with_the_bytes_behind_it(app: FastAPI, repeated: bool) -> None:
    """What is cached of a request is its JSON object alone, and none that holds numbers."""
    for rows in (Z, Z[::-1]):
        request = binary(("latents", rows, "FP32"), outputs=[{"name": "images"}])
        if not repeated:
            request = {"json": {"inputs": [tensor("latents", rows, data=rows.tolist())]}}
        ours, known = asked(app, (DECODE, request), ("/v1/decode", npy(rows)))
        np.testing.assert_array_equal(outputs(ours)["images"].astype("<f4"), loaded(known))


def test_one_input_may_be_bytes_and_another_json(app: FastAPI) -> None:
    """Bytes belong to the inputs that name a size, in their order."""
    x, mask = np.random.default_rng(2).random((1, 1, 16, 16)).astype("<f4"), np.ones((1, 1, 16, 16), "<f4")
    mask[..., :8] = 0
    options = {"seed": 3, "noise": "gaussian", "level": 0.1}
    request = binary(("images", x, "FP32"), parameters=options)
    text = json.loads(request["content"][: int(request["headers"][HEAD])])
    text["inputs"].insert(0, tensor("mask", mask, "BOOL", data=(mask > 0).tolist()))
    mixed = json.dumps(text).encode()
    path = "/v2/models/photo.inpaint/infer"
    one, other = asked(
        app,
        (path, {"content": mixed + x.tobytes(), "headers": {HEAD: str(len(mixed))}}),
        (path, binary(("images", x, "FP32"), ("mask", mask, "FP32"), parameters=options)),
    )
    np.testing.assert_array_equal(outputs(one)["images"], outputs(other)["images"])


def test_outputs_are_chosen_by_name(app: FastAPI) -> None:
    """In their order, each as bytes or in JSON. One that this request does not compute is left out."""
    x = np.zeros((1, 3, 8, 8), "<f4")
    wanted = [
        {"name": "log_var", "parameters": {"binary_data": True}},
        {"name": "mean", "parameters": {"binary_data": False}},
        {"name": "latents"},
    ]
    parameters = {"binary_data_output": True}  # counts only where no outputs are named
    (answer,) = asked(
        app, ("/v2/models/free.encode/infer", binary(("images", x, "FP32"), outputs=wanted, parameters=parameters))
    )
    assert [*outputs(answer)] == ["log_var", "mean"]
    entries = json.loads(answer.content[: int(answer.headers[HEAD])])["outputs"]
    assert ["data" in entry for entry in entries] == [False, True]


def test_a_raw_request_is_the_input_alone(app: FastAPI) -> None:
    """The length 0 says so; all outputs come back as bytes."""
    answer, known = asked(app, (DECODE, {"content": Z.tobytes(), "headers": {HEAD: "0"}}), ("/v1/decode", npy(Z)))
    np.testing.assert_array_equal(outputs(answer)["images"], loaded(known))
    assert HEAD in answer.headers


def test_options_are_parameters_and_scalars_come_back_as_such(app: FastAPI) -> None:
    """Operations without inputs take none; lists of numbers and of texts are outputs."""
    sample = {"json": {"parameters": {"count": 2, "seed": 7, "latents": True}}}
    x = np.full((2, 1, 16, 16), 0.5, "<f4") + np.random.default_rng(0).normal(0, 0.1, (2, 1, 16, 16)).astype("<f4")
    noisy = binary(("images", x, "FP32"), parameters={"noise": "auto", "binary_data_output": True, "seed": 1})
    empty, made, denoised, known = asked(
        app,
        ("/v2/models/mnist-2d.sample/infer", {"content": b""}),
        ("/v2/models/mnist-2d.sample/infer", sample),
        ("/v2/models/photo.denoise/infer", noisy),
        ("/v1/models/photo/denoise", {"json": {"images": x.tolist(), "noise": "auto", "seed": 1}}),
    )
    assert outputs(empty)["images"].shape == (1, 1, 28, 28)
    assert {name: array.shape for name, array in outputs(made).items()} == {"images": (2, 1, 28, 28), "latents": (2, 2)}
    assert made.json()["parameters"]["seed"] == 7
    found, plain = outputs(denoised), known.json()
    assert found["noise"].tolist() == plain["noise"]
    np.testing.assert_allclose(found["level"], plain["level"], rtol=1e-6)
    np.testing.assert_array_equal(found["images"], np.array(plain["images"], np.float32))


def test_notes_are_a_parameter_in_json(app: FastAPI) -> None:
    """Parameters may be text, numbers and booleans alone."""
    x = np.full((1, 1, 16, 16), 0.5, "<f4")
    request = binary(("images", x, "FP32"), ("mask", np.zeros_like(x), "FP32"), parameters={"seed": 1, "level": 0.1})
    (answer,) = asked(app, ("/v2/models/photo.inpaint/infer", request))
    (note,) = json.loads(answer.json()["parameters"]["notes"])
    assert note["code"] == "nothing_seen"


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_both_ways(app: FastAPI, coding: str) -> None:
    """The length of the JSON object counts it uncompressed; a small answer stays as it is, an error too."""
    plain = binary(("latents", Z, "FP32"), parameters={"binary_data_output": True})
    compress = gzip.compress if coding == "gzip" else zlib.compress
    sent = {"content": compress(plain["content"]), "headers": {**plain["headers"], "content-encoding": coding}}
    accepting = {**sent, "headers": {**sent["headers"], "accept-encoding": coding}}
    refusing = {**sent, "headers": {**sent["headers"], "accept-encoding": f"{coding};q=0"}}
    known, same, small, error, without = asked(
        app,
        (DECODE, {**plain, "headers": {**plain["headers"], "accept-encoding": ""}}),
        (DECODE, accepting),
        ("/v2/models/ladder.score/infer", {**binary(("images", np.zeros((1, 1, 4, 6), "<f4"), "FP32"))}),
        ("/v2/models/none.decode/infer", accepting),
        (DECODE, refusing),
    )
    assert "content-encoding" not in known.headers
    assert same.headers["content-encoding"] == coding
    assert same.headers[HEAD] == known.headers[HEAD]
    np.testing.assert_array_equal(outputs(same)["images"], outputs(known)["images"])
    assert small.status_code == 200
    assert "content-encoding" not in small.headers
    assert "content-encoding" not in error.headers
    assert "content-encoding" not in without.headers


def test_metadata_say_what_is_free(app: FastAPI) -> None:
    """-1 where the length depends on the request or on the variant."""
    names = ("mnist-2d.encode", "photo.denoise", "photo.super-resolve", "free.sample", "ladder.score", "free.decode")
    found = {name: asked(app, (f"/v2/models/{name}",))[0].json() for name in names}
    shapes = {
        name: {one["name"]: one["shape"] for one in (*content["inputs"], *content["outputs"])}
        for name, content in found.items()
    }
    latent = {"mean": [-1, 2], "log_var": [-1, 2], "latents": [-1, -1, 2]}
    assert shapes["mnist-2d.encode"] == {"images": [-1, 1, 28, 28], **latent}
    images = {"images": [-1, -1, -1, -1], "mask": [-1, 1, -1, -1]}
    assert shapes["photo.denoise"].items() >= {**images, "level": [-1], "completions": [-1, -1, -1, -1, -1]}.items()
    assert shapes["photo.super-resolve"].items() >= images.items()
    assert found["free.sample"]["inputs"] == []
    assert shapes["free.sample"] == {"images": [-1, -1, -1, -1], "latents": [-1, 2, -1, -1]}
    assert shapes["ladder.score"]["images"] == [-1, 1, 4, 6]
    assert shapes["ladder.score"]["elbo"] == [-1]
    assert shapes["free.decode"]["latents"] == [-1, 2, -1, -1]
    described = found["photo.denoise"]
    assert (described["name"], described["versions"], described["platform"]) == (
        "photo.denoise",
        ["1"],
        "onnxruntime_onnx",
    )
    assert {one["name"]: one["datatype"] for one in described["outputs"]}["noise"] == "BYTES"
    assert "seed" not in shapes["photo.denoise"]


def test_the_configuration_is_that_of_triton(app: FastAPI) -> None:
    """Dimensions without the batch; what may be left out is optional; rows that depend on each other are no batch."""
    denoise, interpolate, sample, score, inpaint = (
        answer.json()
        for answer in asked(
            app,
            *[
                (f"/v2/models/{name}/config",)
                for name in (
                    "photo.denoise", "mnist-2d.interpolate", "mnist-2d.sample", "ladder.score", "photo.inpaint",
                )
            ],
        )
    )  # fmt: skip
    assert denoise["max_batch_size"] == Settings().max_request_rows
    assert denoise["input"] == [
        {"name": "images", "data_type": "TYPE_FP32", "dims": [-1, -1, -1]},
        {"name": "mask", "data_type": "TYPE_FP32", "dims": [1, -1, -1], "optional": True},
    ]
    assert "optional" not in inpaint["input"][1]
    assert interpolate["max_batch_size"] == sample["max_batch_size"] == 0
    assert [one["optional"] for one in interpolate["input"]] == [True, True]
    assert interpolate["input"][0]["dims"] == [-1, 1, 28, 28]
    assert score["output"][0] == {"name": "elbo", "data_type": "TYPE_FP32", "dims": [1], "reshape": {"shape": []}}
    noise = next(one for one in denoise["output"] if one["name"] == "noise")
    assert noise["data_type"] == "TYPE_STRING"


def test_the_server_tells_of_itself(app: FastAPI) -> None:
    """Metadata, liveness and readiness, of the server, of a whole model and of an operation."""
    server, live, up, whole, one, lacking = asked(
        app,
        ("/v2",),
        ("/v2/health/live",),
        ("/v2/health/ready",),
        ("/v2/models/photo/ready",),
        ("/v2/models/photo.denoise/versions/1/ready",),
        ("/v2/models/photo.sample/ready",),
    )
    assert server.json()["name"] == "vae-service"
    assert {"binary_tensor_data", "model_repository"} < {*server.json()["extensions"]}
    assert (live.json(), up.json()) == ({"live": True}, {"ready": True})
    assert whole.json() == {"name": "photo", "ready": True}
    assert one.json() == {"name": "photo.denoise", "ready": True}
    assert "cannot sample" in told(lacking, 422)


def test_statistics_count_requests_and_rows(repository: Repository) -> None:
    """By operation; failures are counted apart, and the times are those of the requests."""
    app = create_app(Settings(), repository)
    good = binary(("latents", Z, "FP32"))
    bad = binary(("latents", Z, "FP32"), parameters={"x": 1})
    *_, one, every = asked(
        app,
        (DECODE, good),
        (DECODE, good),
        (DECODE, bad),
        ("/v2/models/mnist-2d.decode/stats",),
        ("/v2/models/stats",),
    )
    (counted,) = one.json()["model_stats"]
    assert (counted["name"], counted["version"]) == ("mnist-2d.decode", "1")
    assert counted["inference_count"] == 6
    assert 1 <= counted["execution_count"] <= 2
    stats = counted["inference_stats"]
    assert (stats["success"]["count"], stats["fail"]["count"]) == (2, 1)
    assert stats["success"]["ns"] == stats["queue"]["ns"] + stats["compute_infer"]["ns"]
    assert 0 < stats["compute_infer"]["ns"] < 60e9
    assert stats["compute_input"]["count"] == stats["compute_output"]["count"] == stats["compute_infer"]["count"]
    names = {entry["name"] for entry in every.json()["model_stats"]}
    assert {"mnist-2d.decode", "photo.denoise"} < names
    assert "photo.sample" not in names


def test_the_index_lists_whole_models_and_their_operations(app: FastAPI) -> None:
    """A whole model is what load and unload act on; an operation that a model does not offer is not there."""
    (answer,) = asked(app, ("/v2/repository/index", {"content": b""}))
    found = {entry["name"]: entry for entry in answer.json()}
    assert found["photo"] == {"name": "photo", "version": "1", "state": "READY", "reason": ""}
    assert found["free.encode"] == {"name": "free.encode", "version": "2", "state": "READY", "reason": ""}
    assert "photo.sample" not in found
    assert "ladder.interpolate" not in found
    compressed = {"content": gzip.compress(b'{"ready": 1}'), "headers": {"content-encoding": "gzip"}}
    other = {"content": b"{}", "headers": {"content-encoding": "br"}}
    read, refused = asked(app, ("/v2/repository/index", compressed), ("/v2/repository/index", other))
    assert "ready must be true or false" in told(read, 422)
    assert "gzip, deflate" in told(refused, 415)


def test_models_are_loaded_and_unloaded_as_a_whole(flat_models: Path) -> None:
    """By their own name or by that of an operation; the index then has the reason, and lists what is served alone."""
    app = create_app(Settings(models=flat_models, model_control="anonymous", threads=1))
    control = "/v2/repository/models"
    dependents = {"json": {"parameters": {"unload_dependents": False}}}
    unloaded, index, ready, waiting, refused, again, served = asked(
        app,
        (f"{control}/mnist-2d.decode/unload", dependents),
        ("/v2/repository/index", {"content": b"{}"}),
        ("/v2/repository/index", {"json": {"ready": True}}),
        ("/v2/models/mnist-2d.decode/ready",),
        (DECODE, binary(("latents", Z, "FP32"))),
        (f"{control}/mnist-2d/load", {"content": b""}),
        (DECODE, binary(("latents", Z, "FP32"))),
    )
    assert (unloaded.status_code, unloaded.json()) == (200, {"name": "mnist-2d.decode", "unload": True})
    entry = {"name": "mnist-2d", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded by request"}
    assert index.json() == [entry]
    assert ready.json() == []
    assert "unloaded by request" in told(waiting, 503)
    assert told(refused, 503)
    assert refused.headers["retry-after"] == "1"
    assert (again.status_code, served.status_code) == (200, 200)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"config": "{}"}, "model repository"),
        ({"file:1/model.onnx": "AAAA"}, "model repository"),
        ({"unload_dependents": True}, "not known"),
        ([], "must be an object"),
    ],
)
def test_a_load_takes_no_configuration_and_no_files(flat_models: Path, parameters: Any, says: str) -> None:
    """400: what is served is what lies in the model repository; nothing has been loaded anew."""
    app = create_app(Settings(models=flat_models, model_control="anonymous", threads=1))
    (answer,) = asked(app, ("/v2/repository/models/mnist-2d/load", {"json": {"parameters": parameters}}))
    assert says in told(answer, 400)


@pytest.mark.parametrize("name", ["a.encode", "a.super-resolve"])
def test_names_that_end_in_an_operations_name_are_refused(name: str, flat_models: Path, brighter: Any) -> None:
    """They could not be told from an operation of another model; a dot elsewhere harms nobody."""
    with pytest.raises(StartError, match="give the model another name"):
        read_manifest(brighter(flat_models, "1", name), "")
    read_manifest(brighter(flat_models, "1", "encode"), "")
    read_manifest(brighter(flat_models, "1", "encode.v2"), "")


def test_a_name_may_have_dots(tmp_path: Path) -> None:
    """The last one parts model from operation."""
    model = opened(free_version(tmp_path / "free.v2" / "1"))
    app = create_app(Settings(), Repository({"free.v2": {"1": model}}, "free.v2"))
    (answer,) = asked(app, ("/v2/models/free.v2.decode/infer", binary(("latents", np.zeros((1, 2, 2, 2)), "FP64"))))
    assert outputs(answer)["images"].shape == (1, 3, 8, 8)


def spoilt(**changes: Any) -> dict[str, Any]:
    """A request for `mnist-2d.decode` in JSON whose input is changed."""
    return {"json": {"inputs": [{**tensor("latents", Z, data=Z.tolist()), **changes}]}}


def framed(head: str, content: bytes = b"") -> dict[str, Any]:
    return {"content": content or binary(("latents", Z, "FP32"))["content"], "headers": {HEAD: head}}


TWICE = {"inputs": [tensor("latents", Z, data=Z.tolist())] * 2}
BYTES = binary(("latents", Z, "FP32"))
DEEP = b'{"inputs":' + b"[" * 4000 + b"]" * 4000 + b"}"
BAD: Mapping[str, tuple[dict[str, Any], int, str]] = {
    "no JSON": ({"content": b"{"}, 400, "not JSON"),
    "no object": ({"content": b"[]"}, 400, "JSON object such as"),
    "deep": ({"content": DEEP}, 400, "JSON"),
    "NaN": ({"content": b'{"inputs": [NaN]}'}, 400, "finite"),
    "nothing": ({"json": {}}, 422, 'lacks "latents"'),
    "inputs no list": ({"json": {"inputs": {}}}, 400, "list"),
    "input no object": ({"json": {"inputs": [1]}}, 400, "list of objects"),
    "many inputs": ({"json": {"inputs": [{}] * 17}}, 400, "at most 16"),
    "no name": ({"json": {"inputs": [{}]}}, 400, "needs a name"),
    "twice": ({"json": TWICE}, 422, "there twice"),
    "field twice": ({"content": b'{"inputs": [], "inputs": []}'}, 422, "twice"),
    "unknown input": (spoilt(name="images"), 422, 'no input "images"; decode takes latents'),
    "mask": (spoilt(name="mask"), 422, 'no input "mask"'),
    "wrong type": (spoilt(datatype="INT64"), 422, "send FP32"),
    "no type": (spoilt(datatype=None), 422, "send FP32"),
    "unread type": (spoilt(datatype="X" * 999), 422, "send FP32"),
    "levels of latents": (spoilt(datatype="UINT8", data=[0] * 6), 422, "must be floats"),
    "parts of levels": (spoilt(datatype="UINT8"), 422, "not whole"),
    "large levels": (spoilt(datatype="UINT8", data=[256] * 6), 422, "outside 0 to 255"),
    "numbers for truth": (spoilt(datatype="BOOL"), 422, "true and false"),
    "shape no list": (spoilt(shape=6), 422, "list of at most 8"),
    "negative shape": (spoilt(shape=[-1, 2]), 422, "whole numbers"),
    "parts in shape": (spoilt(shape=[3.0, 2]), 422, "whole numbers"),
    "long shape": (spoilt(shape=[1] * 9), 422, "at most 8"),
    "huge shape": (spoilt(shape=[2**40, 2**40]), 422, "its shape is"),
    "empty and huge": (spoilt(shape=[0, 2**62, 2**62], data=[]), 422, "1 or more each"),
    "other shape": (spoilt(shape=[2, 2]), 422, "its shape is [2, 2]"),
    "other nesting": (spoilt(shape=[2, 3]), 422, "its shape is [2, 3]"),
    "wrong width": (spoilt(shape=[2, 3], data=[0.0] * 6), 422, "(n, 2)"),
    "no rows": (spoilt(shape=[0, 2], data=[]), 422, "latents"),
    "ragged": (spoilt(data=[[1, 2], [3]]), 422, "rectangular"),
    "text": (spoilt(data=["a"] * 6), 422, "numbers"),
    "no data": (spoilt(data=None, name="latents"), 422, "numbers"),
    "data and size": (spoilt(parameters={"binary_data_size": 24}), 400, "not both"),
    "shared memory": (spoilt(parameters={"shared_memory_region": "x"}), 422, "shared memory"),
    "input parameters no object": (spoilt(parameters=[1]), 400, "object of strings"),
    "id": ({"json": {"id": 5}}, 400, "id must be a string"),
    "parameters": ({"json": {"parameters": []}}, 400, "object of strings"),
    "unknown parameter": ({"json": {"parameters": {"drawz": 1}}}, 422, "drawz"),
    "reserved parameter": ({"json": {"parameters": {"triton_x": 1}}}, 422, "triton_x"),
    "nested parameter": ({"json": {"parameters": {"channels": {"a": 1}}}}, 422, "channels"),
    "sequence": ({"json": {"parameters": {"sequence_id": 4}}}, 422, "sequence_id"),
    "timeout": ({"json": {"parameters": {"timeout": -1}}}, 422, "microseconds"),
    "timeout text": ({"json": {"parameters": {"timeout": "1"}}}, 422, "microseconds"),
    "unknown output": ({"json": {"inputs": [], "outputs": [{"name": "x"}]}}, 422, 'no output "x"; decode has images'),
    "scalar output": ({"json": {"inputs": [], "outputs": [{"name": "seed"}]}}, 422, "no output"),
    "classes": (
        {"json": {"outputs": [{"name": "images", "parameters": {"classification": 3}}]}}, 422, "classification",
    ),
    "length no number": (framed("-1"), 400, "number of bytes"),
    "length of letters": (framed("1" * 13), 400, "number of bytes"),
    "length too large": (framed("999999"), 400, "must be in the range"),
    "length too small": (framed("3"), 400, "not JSON"),
    "rest missing": (
        {**BYTES, "content": BYTES["content"][:-4]}, 400, "unexpected size for input" ),
    "rest too long": ({**BYTES, "content": BYTES["content"] + b"more"}, 400, "4 bytes follow"),
    "raw of parts": (framed("0", b"12345"), 422, "whole number of float32 rows"),
    "raw of nothing": ({"content": b"", "headers": {HEAD: "0"}}, 422, "whole number of float32 rows"),
    "coding": ({"content": b"{}", "headers": {"content-encoding": "br"}}, 415, "gzip, deflate"),
    "not gzip": ({"content": b"{}", "headers": {"content-encoding": "gzip"}}, 400, "not gzip"),
    "wrong fingerprint": (
        {**BYTES, "headers": {**BYTES["headers"], "x-fingerprint": "other"}}, 409, "fingerprint",
    ),
    "fingerprint parameter": ({"json": {**spoilt()["json"], "parameters": {"fingerprint": "x"}}}, 409, "fingerprint"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(app: FastAPI, case: str) -> None:
    """`{"error": ...}` with the status of `/v1`; memory is given back."""
    request, status, says = BAD[case]
    (answer,) = asked(app, (DECODE, request))
    assert says in told(answer, status)
    assert len(answer.content) < 1000


@pytest.mark.parametrize("size", [23, 0, 2**60, -24, "24", 24.0, True, None])
def test_a_size_must_be_that_of_the_shape(app: FastAPI, size: Any) -> None:
    """Nothing is allocated for a size that is only declared."""
    entry = tensor("latents", Z, parameters={"binary_data_size": size})
    text = json.dumps({"inputs": [entry]}).encode()
    (answer,) = asked(app, (DECODE, {"content": text + Z.tobytes(), "headers": {HEAD: str(len(text))}}))
    assert "binary_data_size" in told(answer, 400 if size is None else 422)


def test_raw_requests_need_a_shape(app: FastAPI) -> None:
    """A model of any size, with variants, or without inputs has none that bytes could have."""
    for name in ("free.encode", "free.decode", "mnist-2d.sample"):
        (answer,) = asked(app, (f"/v2/models/{name}/infer", {"content": bytes(192), "headers": {HEAD: "0"}}))
        assert "send a JSON object" in told(answer, 422)


def test_images_and_latents_exclude_each_other(app: FastAPI) -> None:
    """The message does not name both as what is taken."""
    images, latents = np.zeros((2, 1, 28, 28), np.float32), np.zeros((2, 2), np.float32)
    (answer,) = asked(
        app, ("/v2/models/mnist-2d.interpolate/infer", binary(("images", images, "FP32"), ("latents", latents, "FP32")))
    )
    assert "images or latents; leave one of them out" in told(answer, 422)


def test_names_are_explained(app: FastAPI) -> None:
    """404 says how a name is made; a version and a missing ability are named as on `/v1`."""
    body = binary(("latents", Z, "FP32"))
    whole, unknown, other, version, lacking = asked(
        app,
        ("/v2/models/mnist-2d/infer", body),
        ("/v2/models/x/infer", body),
        ("/v2/models/x.decode/infer", body),
        ("/v2/models/mnist-2d.decode/versions/9/infer", body),
        ("/v2/models/photo.decode/infer", body),
    )
    assert "mnist-2d is a whole model; names here are MODEL.OPERATION, such as mnist-2d.encode" in told(whole, 404)
    assert "names here are MODEL.OPERATION" in told(unknown, 404)
    assert 'no model "x"' in told(other, 404)
    assert 'no version "9"' in told(version, 404)
    assert "cannot decode" in told(lacking, 422)


def test_errors_below_v2_have_its_form_whoever_makes_them(tmp_path: Path) -> None:
    """Keys, rights, rates, methods, paths; and those elsewhere are problems as before."""
    keys = tmp_path / "keys"
    keys.write_text(f"alice {ALICE} infer rate=4/day\nops {OPS} control\n")
    app = create_app(Settings(api_keys=str(keys), model_control=True), Repository({}, ""))
    alice, ops = ({"headers": {"authorization": f"Bearer {key}"}} for key in (ALICE, OPS))
    load = "/v2/repository/models/m/load"
    answers = asked(
        app,
        ("/v2/models/m.encode",),
        (load, {**alice, "content": b""}),
        ("/v2/models/m.encode/infer", {**ops, "content": b"{}"}),
        ("/v2/nowhere", alice),
        (load, {**alice, "method": "GET"}),
        ("/v2/models/m.encode/infer", {**alice, "content": b"{}"}),
        ("/v2/repository/index", {**ops, "content": b""}),
        ("/v2/repository/index", {**alice, "content": b""}),
        ("/v2/health/ready",),
        ("/v2/health/live",),
    )
    statuses = (401, 403, 403, 404, 405, 404, None, None, 503, None)
    errors = [told(one, status) for one, status in zip(answers, statuses, strict=True) if status]
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert "`control`" in errors[1]
    assert "`infer`" in errors[2]
    assert answers[4].headers["allow"] == "POST"
    assert [answer.status_code for answer in answers[6:]] == [200, 200, 503, 200]
    (late,) = asked(app, ("/v2", alice))  # the fifth that has not been refused
    assert "above its limit" in told(late, 429)
    assert int(late.headers["retry-after"]) > 0
    (elsewhere,) = asked(app, ("/v22/x", ops))
    assert elsewhere.json()["code"] == "not_found"


def test_control_is_off_by_default(app: FastAPI) -> None:
    """403 says which setting allows it."""
    (answer,) = asked(app, ("/v2/repository/models/mnist-2d/unload", {"content": b""}))
    assert "VAE_MODEL_CONTROL" in told(answer, 403)


def test_limits_hold(repository: Repository) -> None:
    """Of bodies, of their JSON, of what they decompress to, of rows and of memory, which comes back."""
    settings = Settings(max_body_bytes=40_000, max_json_bytes=2000, memory_bytes=2**20, max_request_rows=100)
    app = create_app(settings, repository)
    rows = np.zeros((101, 2), "<f4")
    long = {"inputs": [tensor("latents", Z, data=Z.tolist())], "id": "x" * 3000}
    text = orjson.dumps({**long, "inputs": [tensor("latents", Z, parameters={"binary_data_size": Z.nbytes})]})
    bomb = {"content": gzip.compress(bytes(10**6)), "headers": {"content-encoding": "gzip", HEAD: "100"}}
    cases = {
        "VAE_MAX_BODY_BYTES": {"content": bytes(40_001), "headers": {HEAD: "10"}},
        "VAE_MAX_JSON_BYTES (2000)": {"json": long},
        "on /v2 tensors as binary data": {"content": text + Z.tobytes(), "headers": {HEAD: str(len(text))}},
        "VAE_MAX_BODY_BYTES (40000)": bomb,
        "VAE_MAX_REQUEST_ROWS": binary(("latents", rows, "FP32")),
        "VAE_MEMORY_BYTES": binary(("latents", rows[:95], "FP32")),
    }
    for says, request in cases.items():
        (answer,) = asked(app, (DECODE, request))
        assert says in told(answer, 413)
    (answer,) = asked(app, (DECODE, binary(("latents", Z, "FP32"))))
    assert answer.status_code == 200
    route = next(one for one in app.routes if getattr(one, "path", "") == "/v2/models/{model}/infer")
    assert route.app.context.memory.taken == 0  # type: ignore[attr-defined]


def test_a_timeout_is_a_deadline(
    slow: Callable[[Callable[[], object]], Repository],
) -> None:
    """In microseconds; the shorter of it and X-Timeout-Ms counts, and 0 is none."""
    app = create_app(Settings(max_rows=8), slow(lambda: None))
    z = np.zeros((1, 8), "<f4")
    path = "/v2/models/digits.decode/infer"
    past, long, none = asked(
        app,
        (path, binary(("latents", z, "FP32"), parameters={"timeout": 1})),
        (path, binary(("latents", z, "FP32"), parameters={"timeout": 50_000_000})),
        (path, binary(("latents", z, "FP32"), parameters={"timeout": 0, "priority": 1})),
    )
    assert "timeout" in told(past, 504)
    assert (long.status_code, none.status_code) == (200, 200)
