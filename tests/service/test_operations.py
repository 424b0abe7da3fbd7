"""Every operation, in every form, against the graphs run by hand."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.api.invoke import Context
from service.api.memory import Memory
from service.api.offload import Offload
from service.api.v1.endpoint import OperationApp
from service.api.v1.openapi import with_operations
from service.observability.metrics import Telemetry
from service.operations.encode import encode
from service.operations.inference.latent import standard_normal
from service.operations.inference.vae import Result, Submit
from service.operations.operation import GIVEN, IMAGES, MEANS, Inputs, Operation, Options, Tensor
from service.operations.reconstruct import reconstruct
from service.operations.registry import OPERATIONS, warm_up
from service.repository.repository import Repository
from service.runtime.batcher import Arrays, Trip
from service.runtime.model import Model
from service.runtime.scheduler import Engine
from service.settings import Settings

Rows = NDArray[np.float32]
Graphs = dict[str, Callable[..., tuple[Rows, ...]]]


def as_npy(array: Rows) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def as_picture(array: Rows, form: str) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(np.rint(array.reshape(8, 8) * 255).astype(np.uint8))
    picture.save(file, form, **({"lossless": True} if form == "WEBP" else {}))
    return file.getvalue()


def base64_of(array: Rows) -> str:
    return base64.b64encode(as_picture(array, "PNG")).decode()


REQUESTS: dict[str, Callable[[Rows], dict[str, Any]]] = {
    "json (n,c,h,w)": lambda x: {"json": {"images": x.tolist()}},
    "json (n,h,w)": lambda x: {"json": {"images": x[:, 0].tolist()}},
    "json base64": lambda x: {"json": {"images": [base64_of(row) for row in x]}},
    "json data URL": lambda x: {"json": {"images": ["data:image/png;base64," + base64_of(row) for row in x]}},
    "npy": lambda x: {"content": as_npy(x), "headers": {"content-type": "application/x-npy"}},
    "npy float64": lambda x: {
        "content": as_npy(x.astype(np.float64)),  # type: ignore[arg-type]
        "headers": {"content-type": "application/x-npy"},
    },
    "npy fortran": lambda x: {
        "content": as_npy(np.asfortranarray(x)),
        "headers": {"content-type": "application/x-npy"},
    },
    "raw": lambda x: {"content": x.tobytes(), "headers": {"content-type": "application/octet-stream"}},
}
SINGLE_REQUESTS: dict[str, Callable[[Rows], dict[str, Any]]] = {
    "json (h,w)": lambda x: {"json": {"images": x[0].tolist()}},
    "json one base64": lambda x: {"json": {"images": base64_of(x)}},
    "png": lambda x: {"content": as_picture(x, "PNG"), "headers": {"content-type": "image/png"}},
    "webp": lambda x: {"content": as_picture(x, "WEBP"), "headers": {"content-type": "image/webp"}},
    "form png": lambda x: {"files": {"file": ("digit.png", as_picture(x, "PNG"), "image/png")}},
    "form npy": lambda x: {"files": {"file": ("digit.npy", as_npy(x), "application/octet-stream")}},
}
IMAGE_OPERATIONS = ("encode", "reconstruct", "denoise", "score?seed=1")


def post(client: httpx.Client, path: str, request: dict[str, Any], accept: str = "application/json") -> httpx.Response:
    headers = {"accept": accept, **request.get("headers", {})}
    response = client.post(path, **{**request, "headers": headers})
    assert response.status_code == 200, response.text
    return response


def numbers(response: httpx.Response, name: str = "images") -> Rows:
    return np.array(response.json()[name], np.float32)


@pytest.mark.parametrize("operation", IMAGE_OPERATIONS)
@pytest.mark.parametrize("form", REQUESTS)
def test_every_form_of_the_same_images_gets_the_same_answer(
    client: httpx.Client, images: Rows, form: str, operation: str
) -> None:
    """JSON in all its shapes, npy in any float type and order, and raw floats are one request."""
    expected = post(client, f"/v1/{operation}", REQUESTS["raw"](images)).json()
    assert post(client, f"/v1/{operation}", REQUESTS[form](images)).json() == expected


@pytest.mark.parametrize("operation", IMAGE_OPERATIONS)
@pytest.mark.parametrize("form", SINGLE_REQUESTS)
def test_every_form_of_one_image_gets_the_same_answer(
    client: httpx.Client, images: Rows, form: str, operation: str
) -> None:
    """One bare image, picture files and forms are one request."""
    expected = post(client, f"/v1/{operation}", REQUESTS["raw"](images[:1])).json()
    assert post(client, f"/v1/{operation}", SINGLE_REQUESTS[form](images[:1])).json() == expected


def test_a_jpeg_is_read(client: httpx.Client, images: Rows) -> None:
    """A JPEG is near the image it was made of, and so is its code."""
    smooth = np.full_like(images[:1], 0.5)
    jpeg = {"content": as_picture(smooth, "JPEG"), "headers": {"content-type": "image/jpeg"}}
    near = numbers(post(client, "/v1/encode", jpeg), "mean")
    exact = numbers(post(client, "/v1/encode", REQUESTS["raw"](smooth)), "mean")
    assert np.allclose(near, exact, atol=0.05)


@pytest.mark.parametrize("operation", ["reconstruct", "denoise", "decode", "sample"])
def test_every_form_of_an_answer_holds_the_same_images(client: httpx.Client, images: Rows, operation: str) -> None:
    """JSON and npy and raw floats agree to the bit, PNG to half a grey level; several rows are one sheet."""
    path, request = f"/v1/{operation}", REQUESTS["raw"](images)
    if operation == "decode":
        request = {"json": {"latents": np.zeros((3, 8)).tolist()}}
    if operation == "sample":
        path, request = "/v1/sample?count=3&seed=5", {}
    expected = numbers(post(client, path, request))
    npy = np.load(io.BytesIO(post(client, path, request, "application/x-npy").content))
    raw = np.frombuffer(post(client, path, request, "application/octet-stream").content, "<f4")
    sheet = np.asarray(Image.open(io.BytesIO(post(client, path, request, "image/png").content)))
    assert np.array_equal(npy, expected)
    assert np.array_equal(raw.reshape(expected.shape), expected)
    assert sheet.shape == (16, 16)
    assert np.abs(sheet[:8, 8:] / 255.0 - expected[1, 0]).max() <= 0.5 / 255 + 1e-6
    assert np.all(sheet[8:, 8:] == 0)


def test_encode_is_the_encoder(client: httpx.Client, images: Rows, graphs: Graphs) -> None:
    """mean and log_var are the graph's own; npy stacks them along axis 1."""
    mean, log_var = graphs["encoder"](images)
    answer = post(client, "/v1/encode", REQUESTS["raw"](images))
    assert np.array_equal(numbers(answer, "mean"), mean)
    assert np.array_equal(numbers(answer, "log_var"), log_var)
    npy = post(client, "/v1/encode", REQUESTS["raw"](images), "application/x-npy")
    assert npy.headers["x-outputs"] == "mean,log_var"
    assert np.array_equal(np.load(io.BytesIO(npy.content)), np.stack([mean, log_var], 1))


def test_encode_draws_from_the_posterior(client: httpx.Client, images: Rows, graphs: Graphs) -> None:
    """latents are mean + std * eps, eps the seed's."""
    mean, log_var = graphs["encoder"](images)
    eps = standard_normal(11, 3, (2, 8))
    answer = post(client, "/v1/encode?draws=2&seed=11", REQUESTS["raw"](images))
    assert answer.json()["seed"] == 11
    assert np.allclose(numbers(answer, "latents"), mean[:, None] + np.exp(0.5 * log_var)[:, None] * eps, atol=1e-6)


def test_reconstruct_composes_encoder_and_decoder(client: httpx.Client, images: Rows, graphs: Graphs) -> None:
    """Without draws the decoder at the posterior's mean; with draws its average over them."""
    mean, log_var = graphs["encoder"](images)
    plain = post(client, "/v1/reconstruct", REQUESTS["raw"](images))
    assert np.array_equal(numbers(plain), graphs["decoder"](mean)[0])
    eps = standard_normal(4, 3, (5, 8))
    z = (mean[:, None] + np.exp(0.5 * log_var)[:, None] * eps).reshape(-1, 8)
    expected = graphs["decoder"](z)[0].reshape(3, 5, 1, 8, 8).mean(1)
    drawn = post(client, "/v1/reconstruct?draws=5&seed=4", REQUESTS["raw"](images))
    assert np.allclose(numbers(drawn), expected, atol=1e-6)


def test_sample_decodes_the_prior(client: httpx.Client, graphs: Graphs) -> None:
    """Images are the decoder's at the seed's latents; more of them never change the first; temperature scales them."""
    answer = post(client, "/v1/sample", {"json": {"count": 5, "seed": 9, "temperature": 0.5, "latents": True}})
    z = np.float32(0.5) * standard_normal(9, 5, (8,))
    assert np.array_equal(numbers(answer, "latents"), z)
    assert np.array_equal(numbers(answer), graphs["decoder"](z)[0])
    more = post(client, "/v1/sample?count=20&seed=9&temperature=0.5", {})
    assert np.array_equal(numbers(more)[:5], numbers(answer))


def test_a_fresh_seed_is_named_and_repeats_the_answer(client: httpx.Client) -> None:
    """Who names no seed gets one, different each time, and the same bytes with it again."""
    first, second = (post(client, "/v1/sample", {}, "application/x-npy") for _ in range(2))
    assert first.content != second.content
    again = post(client, f"/v1/sample?seed={first.headers['x-seed']}", {}, "application/x-npy")
    assert again.content == first.content


def test_denoise_composes_recognition_decoder_fusion_and_correction(
    client: httpx.Client, images: Rows, graphs: Graphs
) -> None:
    """With draws, what is corrected is the mean of what each gives and the variance of the mixture."""
    level = np.tile(np.float32([0, 0.3, 0, 0]), (3, 1))
    mask = np.ones_like(images)
    mean, log_var = graphs["recognition"](images, mask, level)
    eps = standard_normal(2, 3, (4, 8))
    z = mean[:, None] + np.exp(0.5 * log_var)[:, None] * eps
    each = [graphs["fusion"](graphs["decoder"](z[:, k])[0], images, mask, level) for k in range(4)]
    fused, variance = (np.stack(parts) for parts in zip(*each, strict=True))
    given = (fused.mean(0), variance.mean(0) + fused.var(0), images, mask, level)
    restored, variance = graphs["correction"](*given)
    options = "noise=salt-and-pepper&level=0.3&draws=4&seed=2&uncertainty=true&completions=true"
    answer = post(client, f"/v1/denoise?{options}", REQUESTS["raw"](images))
    assert np.allclose(numbers(answer), restored, atol=1e-5)
    assert np.allclose(numbers(answer, "std"), np.sqrt(variance), atol=1e-5)
    assert np.allclose(numbers(answer, "completions"), fused.swapaxes(0, 1), atol=1e-6)


def test_denoise_estimates_the_level_when_not_told(client: httpx.Client, images: Rows, graphs: Graphs) -> None:
    """`auto` uses the model's estimate for the family, names it, and gives what naming it would have given."""
    (estimate,) = graphs["noise_level"](images[:1], np.ones_like(images[:1]))
    auto = post(client, "/v1/denoise", REQUESTS["raw"](images[:1]))
    assert auto.json()["level"] == pytest.approx([float(estimate[0, 0])])
    told = post(client, f"/v1/denoise?level={auto.json()['level'][0]!r}", REQUESTS["raw"](images[:1]))
    assert np.allclose(numbers(told), numbers(auto), atol=1e-6)


def test_denoise_takes_a_mask(client: httpx.Client, images: Rows) -> None:
    """Without noise, what the mask shows is kept, and what it hides makes no difference."""
    mask = np.zeros((8, 8))
    mask[:4] = 1
    other = images.copy()
    other[..., 4:, :] = 0.5
    request = {"noise": "none", "mask": mask.tolist()}
    answer = post(client, "/v1/denoise", {"json": {**request, "images": images.tolist()}})
    same = post(client, "/v1/denoise", {"json": {**request, "images": other.tolist()}})
    assert np.allclose(numbers(answer)[..., :4, :], images[..., :4, :], atol=1e-6)
    assert answer.json() == same.json()
    hidden = numbers(answer)[..., 4:, :]
    assert np.abs(hidden - images[..., 4:, :]).max() > 0.01


def test_denoise_takes_values_outside_the_range(client: httpx.Client, images: Rows) -> None:
    """Noise goes below 0 and above 1; the answer does not."""
    noisy = images + np.random.default_rng(0).normal(0, 0.5, images.shape).astype(np.float32)
    restored = numbers(post(client, "/v1/denoise?level=0.5", REQUESTS["raw"](noisy)))
    assert restored.min() >= 0
    assert restored.max() <= 1


@pytest.mark.parametrize("fit", ["resize", "pad", "crop"])
def test_an_image_of_another_size_is_fitted_when_asked(client: httpx.Client, fit: str) -> None:
    """A white image stays white, but for the black that `pad` adds."""
    white = np.ones((1, 1, 20, 10), np.float32)
    answer = post(client, f"/v1/denoise?noise=none&fit={fit}", {"json": {"images": white.tolist()}})
    fitted = numbers(answer)
    assert fitted.shape == (1, 1, 8, 8)
    assert (fitted[0, 0, :, 0] < 0.5).all() == (fit == "pad")


def test_a_large_request_is_split_and_put_together(client: httpx.Client, graphs: Graphs) -> None:
    """100 rows through batches of 8 come back in order."""
    rows = np.random.default_rng(1).random((100, 1, 8, 8), np.float32)
    answer = post(client, "/v1/encode", REQUESTS["npy"](rows))
    assert np.array_equal(numbers(answer, "mean"), graphs["encoder"](rows)[0])


def test_a_caller_gets_the_form_it_likes_best(client: httpx.Client, images: Rows) -> None:
    """q-values rank; what cannot hold the answer is passed over; a request's own form is the default."""
    png = SINGLE_REQUESTS["png"](images[:1])
    wishes = {
        "*/*": "image/png",
        "application/json;q=0.5, application/x-npy": "application/x-npy",
        "image/*": "image/png",
        "image/jpeg, application/octet-stream;q=0.1": "application/octet-stream",
        "image/png;q=0, */*": "application/json",
    }
    for accept, form in wishes.items():
        assert post(client, "/v1/reconstruct", png, accept).headers["content-type"] == form
    assert post(client, "/v1/encode", png, "*/*").headers["content-type"] == "application/json"
    form_post = SINGLE_REQUESTS["form png"](images[:1])
    assert post(client, "/v1/reconstruct", form_post, "*/*").headers["content-type"] == "image/png"


def test_every_path_to_a_model_is_the_same_model(client: httpx.Client, images: Rows) -> None:
    """Default, named, and named with its version."""
    paths = ("/v1/reconstruct", "/v1/models/digits/reconstruct", "/v1/models/digits/versions/1/reconstruct")
    answers = [post(client, path, REQUESTS["raw"](images)) for path in paths]
    assert len({answer.content for answer in answers}) == 1
    assert answers[0].headers["x-model"] == "digits"
    assert answers[0].headers["x-model-version"] == "1"
    assert answers[0].headers["server-timing"].startswith("queue;dur=")


def test_options_in_a_form_are_read(client: httpx.Client, images: Rows) -> None:
    """A form's text fields are options."""
    request = {"files": {"file": ("x.npy", as_npy(images))}, "data": {"draws": "2", "seed": "3"}}
    assert numbers(post(client, "/v1/encode", request), "latents").shape == (3, 2, 8)


# Declarations

FULL: dict[str, dict[str, Any]] = {
    "encode": {"draws": 2},
    "decode": {},
    "reconstruct": {"draws": 2},
    "denoise": {"quality": "refined", "draws": 2, "uncertainty": True, "completions": True},
    "inpaint": {"quality": "refined", "draws": 2, "uncertainty": True, "completions": True, "noise": "gaussian"},
    "super-resolve": {"quality": "refined", "draws": 2, "uncertainty": True, "completions": True, "level": 0.1},
    "score": {"quality": "refined", "error": True},
    "sample": {"count": 3, "latents": True},
    "interpolate": {"steps": 4, "latent_walk": True},
    "traverse": {"axes": "0", "size": 3, "latents": True},
}
"""Options with which an answer holds every output but the `CONDITIONAL` ones."""
CONDITIONAL = {"noise", "std_scale"}
"""Outputs of models that estimate the kind of the noise, and of heat maps."""


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_an_answer_holds_the_declared_outputs(client: httpx.Client, images: Rows, operation: Operation) -> None:
    """By name, and in shapes where each symbol has one size."""
    taken = {"images": images, "latents": np.zeros((3, 8), np.float32)}.get(operation.takes or "", np.empty(0))
    if operation.name == "interpolate":
        taken = taken[:2]
    if operation.name == "super-resolve":
        taken = taken[..., ::2, ::2]
    arrays = {operation.takes: taken.tolist()} if operation.takes else {}
    masks = {"mask": np.tri(8).tolist()} if operation.masked else {}
    request = {"json": {**arrays, **masks, **FULL[operation.name]}}
    answer = post(client, f"/v1/{operation.name}", request).json()
    assert answer.keys() - GIVEN == {tensor.name for tensor in operation.outputs} - CONDITIONAL
    sizes = {"n": 3, "draws": 2, "steps": 4, "latent": 8, "channels": 1, "height": 8, "width": 8}
    for tensor in operation.outputs:
        if tensor.name in CONDITIONAL:
            continue
        assert np.shape(answer[tensor.name]) == tuple(sizes[axis] for axis in tensor.shape), tensor.name


def test_what_is_not_row_wise_is_computed_as_a_whole(small: Repository) -> None:
    """300 rows minus their common mean are the same numbers in JSON and in binary."""

    async def centred(_model: Model, _submit: Submit, inputs: Inputs, _options: Options) -> Result:
        return Result({"images": inputs.rows - inputs.rows.mean(0)}, {}, Trip((), 0.0, 0.0))

    operation = replace(reconstruct, name="centre", run=centred, row_wise=False)
    settings = Settings()
    engine, telemetry = Engine(max_rows=256, queue_rows=4096), Telemetry(lambda: (0, 0))
    context = Context(settings, small, engine.submit, telemetry, Memory(settings.memory_bytes), Offload())
    served = OperationApp(operation, context)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await served({**scope, "path_params": {}}, receive, send)

    async def scenario() -> None:
        x = np.random.default_rng(0).random((300, 1, 28, 28), np.float32)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=60) as one:
            headers = {"content-type": "application/x-npy"}
            json, npy = [
                await one.post("/", content=as_npy(x), headers={**headers, "accept": accept})
                for accept in ("application/json", "application/x-npy")
            ]
        assert np.array_equal(np.array(json.json()["images"], np.float32), np.load(io.BytesIO(npy.content)))
        await engine.close()

    asyncio.run(scenario())


def test_an_example_may_hold_any_declared_number() -> None:
    """A float that is no array is documented as a number; what is not declared is refused by its name."""
    tensors = (*reconstruct.outputs, Tensor("threshold", (), "Where it cuts"))
    found = replace(reconstruct, outputs=tensors, answer={"images": [[[[0.5]]]], "threshold": 0.5})
    schemas = with_operations({"paths": {}}, [found])["components"]["schemas"]
    assert schemas["ReconstructAnswer"]["properties"]["threshold"]["type"] == "number"
    with pytest.raises(ValueError, match="hold threshold"):
        replace(found, outputs=reconstruct.outputs)


def test_what_a_usual_request_runs_has_been_timed(model: Model, images: Rows) -> None:
    """Every program of every operation: one without a timing would never run in the event loop."""
    programs = []

    async def submit(program: Any, arrays: Arrays, **_: Any) -> Trip:
        programs.append(program)
        return Trip(program.run(*arrays), 0.0, 0.0)

    for operation in OPERATIONS:
        options = operation.options()
        rows = {"images": images, "latents": np.zeros((3, 8), np.float32)}.get(operation.takes or "")
        if rows is None:
            rows = np.empty((options.count, 0), np.float32)  # type: ignore[attr-defined]
        if operation.name == "super-resolve":
            rows = rows[..., ::2, ::2]
        inputs = Inputs(rows[:2] if operation.name == "interpolate" else rows)
        asyncio.run(operation.perform(model, submit, inputs, options))  # type: ignore[arg-type]
    assert {program.operation for program in programs if program.timing is None} == set()
    assert len(set(programs)) > 5


def test_a_new_operation_is_warmed_without_being_asked_for(model: Model, images: Rows) -> None:
    """Its programs come up with golden rows; one that declares no request is refused when it is declared."""

    def bright_rows(graphs: Graphs) -> Callable[..., Arrays]:
        return lambda x: (2 * graphs["decoder"](graphs["encoder"](x)[0])[0],)

    async def run(model: Model, submit: Submit, inputs: Inputs, _options: Options) -> Result:
        trip = await submit(model.plan("brighten", bright_rows), (inputs.rows,))
        return Result({"images": trip.arrays[0]}, {}, trip)

    operation = Operation("brighten", "", "", Options, run, (IMAGES,), (MEANS,), row_wise=True, example={}, answer={})
    ((program, (rows,)),) = warm_up(model, {"encoder/x": images}, (operation,))
    assert program is model.plan("brighten", bright_rows)
    assert np.array_equal(rows, images[:2])
    with pytest.raises(ValueError, match="encode has no warm-up"):
        replace(encode, warm_up=())
