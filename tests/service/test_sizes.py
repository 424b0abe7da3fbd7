"""Images of any size: read in every layout, padded and cut back, in memory bounded by levels and tiles."""

from __future__ import annotations

import asyncio
import base64
import io
import tracemalloc
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from service.app import create_app
from service.repository.repository import Repository
from service.settings import Settings
from tests.support.versions import free_version, opened

NPY, JSON, PNG = ({"accept": kind} for kind in ("application/x-npy", "application/json", "image/png"))
SENT_NPY = {"content-type": "application/x-npy"}
SENT_PNG = {"content-type": "image/png"}
ODD = (389, 517)
"""Height and width."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """`free` has variants for grey and colour, `colour` is for colour alone and restores."""
    folder = tmp_path_factory.mktemp("sizes")
    free = opened(free_version(folder / "free" / "1", channels=(3, 1)))
    colour = opened(free_version(folder / "colour" / "1", graphs=("encoder", "decoder", "restoration")))
    return Repository({"free": {"1": free}, "colour": {"1": colour}}, "free")


@pytest.fixture(scope="module")
def app(repository: Repository) -> FastAPI:
    return create_app(Settings(tile_pixels=2**16), repository)


def asked(app: FastAPI, *requests: tuple[str, dict[str, Any]]) -> list[httpx.Response]:
    """Answers to requests made at once."""

    async def scenario() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as one:
            return await asyncio.gather(*(one.post(f"/v1/{path}", **request) for path, request in requests))

    return asyncio.run(scenario())


def array(answer: httpx.Response) -> NDArray[Any]:
    assert answer.status_code == 200, answer.text
    found: NDArray[Any] = np.load(io.BytesIO(answer.content))
    return found


def npy(x: NDArray[Any], accept: dict[str, str] = NPY) -> dict[str, Any]:
    file = io.BytesIO()
    np.save(file, x)
    return {"content": file.getvalue(), "headers": {**SENT_NPY, **accept}}


def picture(levels: NDArray[Any], form: str = "PNG") -> bytes:
    """A picture of levels (h, w) or (h, w, c)."""
    file = io.BytesIO()
    Image.fromarray(levels).save(file, form)
    return file.getvalue()


def drawn(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def shown(answer: httpx.Response) -> NDArray[np.uint8]:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)))


@pytest.mark.parametrize("tile_pixels", [2**16, 2**20])
def test_an_odd_picture_comes_back_in_its_size(repository: Repository, tile_pixels: int) -> None:
    """Grey and colour, whole and in tiles, as PNG and as array; the levels of the PNG are the nearest."""
    app = create_app(Settings(tile_pixels=tile_pixels), repository)
    for levels in (drawn(*ODD, 3), drawn(*ODD)):
        sent = {"content": picture(levels)}
        as_png, as_npy = asked(
            app,
            ("reconstruct", {**sent, "headers": {**SENT_PNG, **PNG}}),
            ("reconstruct", {**sent, "headers": {**SENT_PNG, **NPY}}),
        )
        found, exact = shown(as_png), array(as_npy)
        assert found.shape == levels.shape
        assert exact.shape == (1, levels.shape[2] if levels.ndim == 3 else 1, *ODD)
        expected = 255 * exact[0].transpose(1, 2, 0).reshape(levels.shape)
        assert np.abs(found - expected).max() <= 0.51


def test_padding_is_reflection_and_is_cut_off(app: FastAPI, repository: Repository) -> None:
    """The answer is that of the reflected image, cut; an image below the least size is reflected over and over."""
    model = repository.find("colour", None)
    for height, width, tall, wide in ((30, 41, 32, 44), (3, 2, 8, 8), (1, 9, 8, 12)):
        x = np.random.default_rng(1).random((1, 3, height, width)).astype(np.float32)
        rows, columns = (
            (side - 1 - np.abs(np.arange(longer) % max(1, 2 * side - 2) - (side - 1)))
            for side, longer in ((height, tall), (width, wide))
        )
        padded = np.ascontiguousarray(x[:, :, rows][..., columns])
        assert np.array_equal(padded[..., :height, :width], x)
        mean, _ = model.graphs["encoder"](padded)
        (known,) = model.graphs["decoder"](mean)
        path = "models/colour/"
        encoded, made = asked(app, (f"{path}encode", npy(x)), (f"{path}reconstruct", npy(x)))
        assert array(encoded).shape == (1, 2, 2, tall // 4, wide // 4)
        assert np.allclose(array(encoded)[:, 0], mean, atol=1e-5)
        assert np.allclose(array(made), known[..., :height, :width], atol=1e-5)


def test_sizes_in_one_load_are_as_alone(app: FastAPI) -> None:
    """The same bytes, whatever sizes and channels share the queue."""
    sent = [
        ("reconstruct?draws=2&seed=3", npy(drawn(2, *shape)))
        for shape in ((24, 40, 3), (24, 40, 1), (17, 33, 3), (24, 40, 3))
    ]
    together = [answer.content for answer in asked(app, *sent * 3)]
    alone = [asked(app, one)[0].content for one in sent]
    assert together == alone * 3


@pytest.mark.parametrize(
    ("shape", "read"),
    [
        ((2, 3, 9, 11), (2, 3, 9, 11)),
        ((2, 1, 9, 11), (2, 1, 9, 11)),
        ((2, 9, 11, 3), (2, 3, 9, 11)),
        ((2, 9, 11, 1), (2, 1, 9, 11)),
        ((3, 9, 11), (1, 3, 9, 11)),
        ((1, 9, 11), (1, 1, 9, 11)),
        ((9, 11, 3), (1, 3, 9, 11)),
        ((9, 11, 1), (1, 1, 9, 11)),
        ((5, 9, 11), (5, 1, 9, 11)),
        ((9, 11), (1, 1, 9, 11)),
        ((3, 9, 3), (1, 3, 9, 3)),
        ((3, 3, 9, 3), (3, 3, 9, 3)),
        ((1, 9, 3), (1, 1, 9, 3)),
        ((2, 5, 9, 11), None),
        ((7,), None),
    ],
)
def test_channels_choose_the_variant(app: FastAPI, shape: tuple[int, ...], read: tuple[int, ...] | None) -> None:
    """In every layout; where two readings are possible, channels come before height, and colour before many greys."""
    x = np.random.default_rng(2).random(shape).astype(np.float32)
    answers = asked(app, ("reconstruct", npy(x)), ("reconstruct", {"json": {"images": x.tolist()}, "headers": NPY}))
    if read is None:
        assert {answer.status_code for answer in answers} == {422}
        assert all("(n, 1 or 3, height, width)" in answer.json()["detail"] for answer in answers)
    else:
        assert [array(answer).shape for answer in answers] == [read, read]


def palette(levels: NDArray[np.uint8], *colours: int) -> bytes:
    image = Image.fromarray(levels % 2).convert("P")
    image.putpalette(bytes(colours))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "channels"),
    [
        (picture(drawn(9, 11)), 1),
        (picture(drawn(9, 11, 3)), 3),
        (picture(drawn(9, 11, 4)), 3),
        (picture(drawn(9, 11, 2)), 1),
        (picture(drawn(9, 11), "JPEG"), 1),
        (picture(drawn(9, 11, 3), "JPEG"), 3),
        (picture(drawn(9, 11), "BMP"), 1),
        (picture(drawn(9, 11, 3), "BMP"), 3),
        (picture(drawn(9, 11, 3), "WEBP"), 3),
        (picture(drawn(9, 11).astype(np.uint16) * 257), 1),
        (palette(drawn(9, 11), 0, 0, 0, 9, 9, 9), 1),
        (palette(drawn(9, 11), 0, 0, 0, 9, 9, 8), 3),
    ],
)
def test_the_mode_of_a_picture_chooses_the_variant(app: FastAPI, body: bytes, channels: int) -> None:
    """Grey pictures are grey, all others colour, in a body, a form and base64; one of colours reads all as colour."""
    ways = [
        {"content": body, "headers": {**SENT_PNG, **NPY}},
        {"files": {"file": ("a", body)}, "headers": NPY},
        {"json": {"images": [base64.b64encode(body).decode()]}, "headers": NPY},
    ]
    for answer in asked(app, *(("reconstruct", way) for way in ways)):
        assert array(answer).shape == (1, channels, 9, 11)
    for answer in asked(app, *(("models/colour/reconstruct", way) for way in ways)):
        assert array(answer).shape == (1, 3, 9, 11)


def test_latents_of_any_size_are_decoded(app: FastAPI, repository: Repository) -> None:
    """Those that the model's own images have; a single one may leave out n."""
    z = np.random.default_rng(3).standard_normal((2, 2, 5, 7)).astype(np.float32)
    for sent in (z, z[0]):
        (answer,) = asked(app, ("decode", npy(sent)))
        (known,) = repository.find("free", None).graphs["decoder"](z[: 1 if sent.ndim == 3 else 2])
        assert np.allclose(array(answer), known, atol=1e-5)
    for shape in ((2, 3, 5, 7), (2, 2, 1, 7), (5, 7), (2, 2, 0, 7)):
        (answer,) = asked(app, ("decode", npy(np.zeros(shape, np.float32))))
        assert answer.status_code == 422, shape


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [(250, 301), (300, 256)])
def test_levels_of_large_pictures_are_the_pixels_of_small_ones(
    repository: Repository, kind: Any, size: tuple[int, int]
) -> None:
    """Whether a picture is kept as levels, of 8 or 16 bits, changes no answer by more than rounding."""
    levels = np.random.default_rng(4).integers(0, np.iinfo(kind).max + 1, size, kind)
    large, small = (create_app(Settings(tile_pixels=pixels), repository) for pixels in (2**16, 2**18))
    sent = ("reconstruct", {"content": picture(levels), "headers": {**SENT_PNG, **NPY}})
    found, known = (array(asked(app, sent)[0]) for app in (large, small))
    assert np.allclose(found, known, atol=1e-4)
    if kind is np.uint8:
        assert np.array_equal(array(asked(large, ("reconstruct", npy(levels)))[0]), found)
        ambiguous = asked(large, ("reconstruct", npy(levels & 1)))[0]
        assert (ambiguous.status_code, ambiguous.json()["code"]) == (422, "invalid_value")


def test_a_large_picture_takes_few_bytes_a_pixel(repository: Repository) -> None:
    """As a picture of 24 megapixels with the default memory: in PNG it is answered, as array or text it is refused."""
    height, width = 1500, 2000
    memory_bytes = 2**29 * height * width // (4000 * 6000)
    app = create_app(Settings(memory_bytes=memory_bytes, tile_pixels=2**16), repository)
    slope = np.linspace(0, 255, width).astype(np.uint8)
    body = picture(np.broadcast_to(slope[:, None], (height, width, 3)), "JPEG")
    sent = [("reconstruct", {"content": body, "headers": {**SENT_PNG, **kind}}) for kind in (PNG, NPY, JSON)]
    tracemalloc.start()
    (as_png,) = asked(app, sent[0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert shown(as_png).shape == (height, width, 3)
    assert peak < 12 * height * width, "arrays and bytes, without the memory of Pillow and onnxruntime"
    as_npy, as_json = (asked(app, one)[0] for one in sent[1:])
    assert (as_npy.status_code, as_json.status_code) == (413, 413)


def test_large_pictures_of_one_form_share_a_size_and_a_kind(app: FastAPI) -> None:
    """Levels of 8 and of 16 bits may be mixed; grey and colour may not."""
    eight = drawn(260, 261)
    sixteen = eight.astype(np.uint16) * 257

    def form(*files: bytes) -> dict[str, Any]:
        return {"files": [("file", ("a", body)) for body in files], "headers": NPY}

    mixed, wrong = asked(
        app,
        ("reconstruct", form(picture(eight), picture(sixteen))),
        ("reconstruct", form(picture(eight), picture(drawn(260, 261, 3)))),
    )
    both = array(mixed)
    assert np.allclose(both[0], both[1], atol=1e-5)
    assert (wrong.status_code, "all grey or all colour" in wrong.json()["detail"]) == (422, True)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "fit": ("encode?fit=resize", npy(np.zeros((9, 9, 3), np.float32)), "takes images of any size; leave fit out"),
    "tile": ("models/colour/denoise?fit=tile", npy(np.zeros((9, 9, 3), np.float32)), "leave fit out"),
    "a side above the largest": ("encode", npy(np.zeros((1, 8193), np.float32)), "at most 8192; shrink"),
    "enlarged above the largest": (
        "models/colour/super-resolve?factor=4",
        npy(np.zeros((3, 1, 2049), np.float32)),
        "at most 8192; shrink",
    ),
    "raw": (
        "encode",
        {"content": bytes(4 * 3 * 64), "headers": {"content-type": "application/octet-stream"}},
        "send application/x-npy or a picture",
    ),
    "raw latents": (
        "decode",
        {"content": bytes(4 * 8), "headers": {"content-type": "application/octet-stream"}},
        "send application/x-npy",
    ),
    "above 1": ("encode", npy(np.full((9, 9, 3), 1.1, np.float32)), "[0, 1]"),
    "a mask of another size": (
        "models/colour/inpaint",
        {"json": {"images": np.zeros((9, 9, 3)).tolist(), "mask": np.ones((9, 10)).tolist()}},
        "mask has shape",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_size_helps_is_refused_with_the_fix(app: FastAPI, case: str) -> None:
    """422, and the message names what works."""
    path, request, word = REFUSED[case]
    (answer,) = asked(app, (path, request))
    assert answer.status_code == 422, answer.text
    assert word in answer.json()["detail"]


def test_a_model_tells_its_sizes(app: FastAPI) -> None:
    """As the manifest writes them, with each variant; images over HTTP lie in [0, 1]."""

    async def told() -> dict[str, Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as one:
            return dict((await one.get("/v1/models/free")).json())

    found = asyncio.run(told())
    assert found["input_shape"] == [3, "height", "width"]
    assert found["latent_shape"] == [2, "height/4", "width/4"]
    assert found["size"] == {"multiple_of": 4, "min": 8, "max": 8192}
    assert found["tiles"] == {"side": None, "margin": 8, "exact": True}
    assert [one["input_shape"] for one in found["variants"]] == [[1, "height", "width"]]
    assert (found["scaling_factor"], found["shift_factor"], found["groups"]) == (1.0, 0.0, [])
    assert found["value_range"] == [0.0, 1.0]
