"""What an answer keeps of the pictures that were sent: bits, scale, opacity, profile, pages and frames."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import sys
import zlib
from typing import Any

import httpx
import imagecodecs
import numpy as np
import pytest
import tifffile
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image, ImageCms

from service.app import create_app
from service.repository.repository import Repository
from service.settings import Settings
from tests.support.versions import free_version, opened

RESTORE = "denoise?noise=none"
KEPT = {"fusion": "restored = Identity (y) nothing = Mul (y, zero) variance = Add (nothing, little)"}
"""Restoration that changes nothing."""
SIZE = (12, 20)
"""Height and width."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """`both` has variants for grey and colour and restores, `grey` is for grey alone."""
    folder, known = tmp_path_factory.mktemp("bits"), {"graphs": ("encoder", "decoder", "restoration"), "bodies": KEPT}
    both = opened(free_version(folder / "both" / "1", channels=(3, 1), **known))
    grey = opened(free_version(folder / "grey" / "1", channels=(1,), **known))
    return Repository({"both": {"1": both}, "grey": {"1": grey}}, "both")


@pytest.fixture(scope="module")
def app(repository: Repository) -> FastAPI:
    return create_app(Settings(), repository)


def asked(app: FastAPI, path: str, body: bytes, media_type: str = "image/png", accept: str = "*/*") -> httpx.Response:
    """The answer to a file."""
    return sent(app, path, content=body, headers={"content-type": media_type, "accept": accept})


def sent(app: FastAPI, path: str, **request: Any) -> httpx.Response:
    async def scenario() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as one:
            return await one.post(f"/v1/{path}", **request)

    return asyncio.run(scenario())


def levels(kind: Any, *shape: int) -> NDArray[Any]:
    """Every level of 16 bits is among them where there are enough pixels."""
    known = np.iinfo(kind)
    return np.random.default_rng(1).integers(known.min, known.max, shape, kind, endpoint=True)


def tiff(array: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def read_tiff(answer: httpx.Response) -> tifffile.TiffFile:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/tiff"
    return tifffile.TiffFile(io.BytesIO(answer.content))


def read_png(answer: httpx.Response) -> NDArray[Any]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return imagecodecs.png_decode(answer.content)


@pytest.mark.parametrize("tile_pixels", [2**20, 2**16], ids=["whole", "in tiles"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_come_back_exactly(repository: Repository, channels: int, tile_pixels: int) -> None:
    """PNG and TIFF into each other, where nothing is to be restored: all 65,536 levels, whole and as integers."""
    app = create_app(Settings(tile_pixels=tile_pixels), repository)
    known = np.arange(2**16, dtype=np.uint16)
    image = np.stack([np.roll(known, 1000 * k).reshape(256, 256) for k in range(channels)], -1)
    image = np.squeeze(np.tile(image, (2, 1, 1)), -1) if channels == 1 else np.tile(image, (2, 1, 1))
    bodies = {
        "image/png": imagecodecs.png_encode(image, level=1),
        "image/tiff": tiff(image, photometric="rgb" if channels == 3 else "minisblack"),
    }
    for media_type, body in bodies.items():
        like = asked(app, RESTORE, body, media_type)
        assert like.headers["content-type"] == media_type
        as_png = read_png(asked(app, RESTORE, body, media_type, "image/png"))
        with read_tiff(asked(app, RESTORE, body, media_type, "image/tiff")) as file:
            as_tiff = file.asarray()
        for found in (as_png, as_tiff):
            assert (found.dtype, found.shape) == (np.uint16, image.shape)
            assert np.array_equal(found, image)


def test_a_16_bit_picture_is_what_its_numbers_are(app: FastAPI) -> None:
    """Colours and opacity in 16 bits, divided by 65,535, whichever file holds them."""
    image = levels(np.uint16, *SIZE, 3)
    expected = np.moveaxis(image, -1, 0)[None] / 65535
    for body in (imagecodecs.png_encode(image), tiff(image, photometric="rgb"), tiff(image, compression="zstd")):
        answer = asked(app, RESTORE, body, accept="application/json").json()
        assert np.abs(np.array(answer["images"]) - expected).max() < 1e-7


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("model", ["both", "grey"])
def test_opacity_comes_back_unchanged(app: FastAPI, kind: Any, channels: int, model: str) -> None:
    """With the colours under it as they are stored; an array holds the colours alone."""
    image = levels(kind, *SIZE, channels)
    body, path = imagecodecs.png_encode(image), f"models/{model}/{RESTORE}"
    found = read_png(asked(app, path, body))
    assert np.array_equal(found[..., -1], image[..., -1])
    if channels == 2 or model == "both":
        assert np.array_equal(found, image)
    with read_tiff(asked(app, path, body, accept="image/tiff")) as file:
        assert np.array_equal(file.asarray()[..., -1], image[..., -1])
    images = np.array(asked(app, path, body, accept="application/json").json()["images"])
    assert images.shape == (1, 3 if (channels, model) == (4, "both") else 1, *SIZE)


def test_opacity_grows_with_the_picture(app: FastAPI) -> None:
    """Super-resolution enlarges it as well."""
    image = levels(np.uint8, *SIZE, 4)
    image[..., 3] = 128
    found = read_png(asked(app, "super-resolve?factor=2", imagecodecs.png_encode(image)))
    assert found.shape == (2 * SIZE[0], 2 * SIZE[1], 4)
    assert (found[..., 3] == 128).all()


def test_where_images_are_not_restored_transparency_is_black(app: FastAPI) -> None:
    """As ever: an encoder sees what a viewer on black shows."""
    image = levels(np.uint8, *SIZE, 4)
    image[..., 3] = 255 * (image[..., 3] > 100)
    black = image[..., :3] * (image[..., 3:] > 0)
    one, two = (
        asked(app, "encode", imagecodecs.png_encode(known), accept="application/json").json()["mean"]
        for known in (image, black)
    )
    assert one == two


PROFILES = {mode: ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() for mode in ("RGB",)}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_the_colour_profile_is_passed_through(app: FastAPI, form: str) -> None:
    """From every format that has one to PNG and TIFF, of 8 and of 16 bits; not to pictures of other channels."""
    file, profile = io.BytesIO(), PROFILES["RGB"]
    Image.fromarray(levels(np.uint8, *SIZE, 3)).save(file, form, icc_profile=profile)
    as_png = asked(app, RESTORE, file.getvalue(), accept="image/png")
    assert Image.open(io.BytesIO(as_png.content)).info["icc_profile"] == profile
    with read_tiff(asked(app, RESTORE, file.getvalue(), accept="image/tiff")) as found:
        assert found.pages.first.iccprofile == profile
    as_grey = asked(app, f"models/grey/{RESTORE}", file.getvalue(), accept="image/png")
    assert "icc_profile" not in Image.open(io.BytesIO(as_grey.content)).info


def test_the_profile_of_16_bits_is_passed_through(app: FastAPI) -> None:
    """A TIFF of 16 bits to PNG."""
    body = tiff(levels(np.uint16, *SIZE, 3), photometric="rgb", iccprofile=PROFILES["RGB"])
    answer = asked(app, RESTORE, body, accept="image/png")
    assert Image.open(io.BytesIO(answer.content)).info["icc_profile"] == PROFILES["RGB"]
    assert np.array_equal(read_png(answer), levels(np.uint16, *SIZE, 3))


STACKS: dict[str, tuple[tuple[int, ...], dict[str, Any], int]] = {
    "pages": ((5,), {"photometric": "minisblack", "resolution": (3.5, 7.0), "resolutionunit": 3}, 5),
    "ImageJ": (
        (2, 3, 2),
        {"imagej": True, "resolution": (5.5, 5.5), "metadata": {"axes": "TZCYX", "unit": "um", "spacing": 0.5}},
        12,
    ),
    "ImageJ with tables of colours": (
        (2,),
        {"imagej": True, "metadata": {"axes": "CYX", "LUTs": [np.tile(np.arange(256, dtype=np.uint8), (3, 1))] * 2}},
        2,
    ),
    "OME": ((2, 3), {"ome": True, "compression": "zlib", "predictor": True, "metadata": {"axes": "CZYX"}}, 6),
    "OME, large, in tiles": (
        (2,),
        {"ome": True, "bigtiff": True, "byteorder": ">", "tile": (16, 16), "compression": "lzw",
         "metadata": {"axes": "CYX", "PhysicalSizeX": 0.1, "Channel": {"Name": ["a", "b"]}}},
        2,
    ),
    "channels as samples": ((2, 4), {"photometric": "minisblack", "planarconfig": "separate"}, 8),
}  # fmt: skip


@pytest.mark.parametrize("case", STACKS)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_stack_comes_back_with_its_axes(app: FastAPI, case: str, kind: Any) -> None:
    """Pages and channels are rows; numbers, axes, resolution, compression and byte order are those of what was sent."""
    shape, options, rows = STACKS[case]
    stack = levels(kind, *shape, *SIZE)
    body = tiff(stack, **options)
    assert len(asked(app, RESTORE, body, accept="application/json").json()["images"]) == rows
    with read_tiff(asked(app, RESTORE, body, "image/tiff")) as found, tifffile.TiffFile(io.BytesIO(body)) as known:
        assert np.array_equal(found.asarray(), stack)
        assert [one.axes for one in found.series] == [one.axes for one in known.series]
        assert found.ome_metadata == known.ome_metadata
        assert str(found.imagej_metadata) == str(known.imagej_metadata)
        assert found.byteorder == known.byteorder
        for name in ("compression", "predictor", "resolution", "resolutionunit"):
            assert getattr(found.pages.first, name) == getattr(known.pages.first, name), name


def test_an_enlarged_stack_keeps_its_scale(app: FastAPI) -> None:
    """Twice the pixels are twice the pixels a centimetre. Axes of another size are not claimed."""
    body = tiff(levels(np.uint16, 2, *SIZE), ome=True, resolution=(100, 50), resolutionunit=3)
    with read_tiff(asked(app, "super-resolve?factor=2", body, "image/tiff")) as found:
        assert found.asarray().shape == (2, 2 * SIZE[0], 2 * SIZE[1])
        assert found.pages.first.resolution == (200, 100)
        assert found.ome_metadata is None


def test_a_form_and_base64_keep_as_much(app: FastAPI) -> None:
    """A stack in a form is answered as one; in JSON it is rows, and Accept may still ask for its type."""
    stack = levels(np.uint16, 3, *SIZE)
    body = tiff(stack, photometric="minisblack")
    in_form = sent(app, RESTORE, files={"file": ("a.tif", body)})
    in_json = sent(
        app,
        "denoise",
        json={"images": base64.b64encode(body).decode(), "noise": "none"},
        headers={"accept": "image/tiff"},
    )
    for answer in (in_form, in_json):
        with read_tiff(answer) as found:
            assert np.array_equal(found.asarray(), stack)
    two = [("file", ("a.png", imagecodecs.png_encode(page))) for page in stack[:2]]
    assert read_png(sent(app, RESTORE, files=two)).shape == (SIZE[0], 2 * SIZE[1])


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i2", "i4", "u4", "i8"])
def test_numbers_without_a_known_white_need_a_scale(app: FastAPI, kind: str) -> None:
    """They come back in their type and scale; without `scale` the refusal names it."""
    stack = np.random.default_rng(2).normal(60.0, 20.0, (2, *SIZE)).clip(1, 120).astype(kind)
    body = tiff(stack, photometric="minisblack")
    refused = asked(app, RESTORE, body, "image/tiff")
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_value")
    assert "scale=MIN,MAX" in refused.json()["detail"]
    for scale in ("auto", "0,127.5"):
        with read_tiff(asked(app, f"{RESTORE}&scale={scale}", body, "image/tiff")) as found:
            pages = found.asarray()
        assert pages.dtype == stack.dtype
        assert np.abs(pages - stack.astype(np.float64)).max() <= (
            0 if kind[0] in "iu" else 0.1 if kind == "f2" else 1e-4
        )
    seen = np.array(asked(app, f"{RESTORE}&scale=0,127.5", body, accept="application/json").json()["images"])
    assert np.allclose(seen[:, 0], stack.astype(np.float64) / 127.5, atol=1e-3)
    assert read_png(asked(app, f"{RESTORE}&scale=auto", body, accept="image/png")).dtype == np.uint16


def test_a_scale_stretches_levels_too(app: FastAPI) -> None:
    """Of 12 bits in 16: the model sees [0, 1], and the numbers come back, in a query, a form and JSON."""
    image = levels(np.uint16, *SIZE) >> 4
    body = tiff(image)
    requests = (
        {"content": body, "headers": {"content-type": "image/tiff"}, "params": {"noise": "none", "scale": "0,4095"}},
        {"files": {"file": body}, "data": {"noise": "none", "scale": "0,4095"}},
        {"json": {"images": [base64.b64encode(body).decode()], "noise": "none", "scale": "0,4095"}},
    )
    for request in requests:
        seen = sent(
            app, "denoise", **{**request, "headers": {**request.get("headers", {}), "accept": "application/json"}}
        )
        assert np.allclose(np.array(seen.json()["images"])[0, 0], image / 4095, atol=1e-6)
    assert np.array_equal(read_tiff(sent(app, "denoise", **requests[1])).asarray(), image)


@pytest.mark.parametrize("scale", ["5,5", "9,1", "a", "1", "0,1e999", "nan,1", "0,1,2"])
def test_a_scale_is_two_numbers_or_auto(app: FastAPI, scale: str) -> None:
    """Anything else is refused by name, and so is a scale of arrays."""
    body = tiff(levels(np.int16, *SIZE))
    answer = asked(app, f"{RESTORE}&scale={scale}", body)
    assert answer.status_code == 422, answer.text
    assert "scale" in answer.json()["detail"]
    array = sent(app, "denoise", json={"images": [[0.5] * 8] * 8, "scale": "0,1"})
    assert (array.status_code, array.json()["code"]) == (422, "invalid_option")


def test_numbers_that_are_not_finite_are_refused(app: FastAPI) -> None:
    """With either scale."""
    image = np.full(SIZE, 0.5, np.float32)
    image[3, 4] = np.nan
    for scale in ("auto", "0,1"):
        answer = asked(app, f"{RESTORE}&scale={scale}", tiff(image))
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_value"), answer.text


def gif(frames: list[Image.Image], **options: Any) -> bytes:
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


def test_a_gif_comes_back_with_its_frames(app: FastAPI) -> None:
    """Grey frames exactly, with their durations and repetitions."""
    stack = levels(np.uint8, 4, *SIZE)
    body = gif([Image.fromarray(page) for page in stack], duration=[50, 120, 70, 200], loop=3)
    answer = asked(app, RESTORE, body, "image/gif")
    assert answer.headers["content-type"] == "image/gif"
    with Image.open(io.BytesIO(answer.content)) as found:
        assert (found.n_frames, found.info["loop"]) == (4, 3)
        for k, duration in enumerate((50, 120, 70, 200)):
            found.seek(k)
            assert found.info["duration"] == duration
            assert np.array_equal(np.asarray(found.convert("L")), stack[k])


def test_a_coloured_gif_and_one_that_was_asked_for(app: FastAPI) -> None:
    """Colours are rounded to 256 a frame. Without a wish, Java's default header included, nothing becomes a GIF."""
    colours = [Image.new("RGB", SIZE[::-1], colour) for colour in ("red", "lime", "blue")]
    answer = asked(app, RESTORE, gif(colours), "image/png")
    with Image.open(io.BytesIO(answer.content)) as found:
        pixels = []
        for k in range(3):
            found.seek(k)
            pixels.append(found.convert("RGB").getpixel((5, 5)))
    assert pixels == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    wished = sent(app, "sample?count=3&height=8&width=8", headers={"accept": "image/gif"})
    assert Image.open(io.BytesIO(wished.content)).n_frames == 3
    java = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"
    usual = sent(app, "sample?count=3&height=8&width=8", headers={"accept": java})
    assert usual.headers["content-type"] == "application/json"


def test_an_avif_is_read(app: FastAPI) -> None:
    """Lossless, and turned as it says."""
    image = np.kron(levels(np.uint8, 3, 5), np.full((4, 4), 1, np.uint8))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(image)).save(file, "AVIF", quality=100, exif=exif)
    found = read_png(asked(app, f"models/grey/{RESTORE}", file.getvalue(), "image/avif"))
    assert found.shape == SIZE
    assert np.abs(found.astype(int) - image).max() <= 2


HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAA"
    "ACJpbG9jAAAAAERAAAEAAQAAAAABoAABAAAAAAAAAEAAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRt"
    "AAAAAAABAAAA/GlwcnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMA"
    "AAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXPBiQAAABNjb2xybmNs"
    "eAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAAEAAAAAEAAAAQAAAAAf///9AAAAAC////0AAAAAIAAAAQcGl4"
    "aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAASG1kYXQAAAA8KAGvEyFyw0DlMPv9uk+ET5cmwqnzICy8XylV6+cQ"
    "Te0WgPf2uq/2pyyioNSvDqTUpXFcnElQj84W6c4u"
)
"""16 x 16 pixels, red above blue."""


def test_a_heic_is_read_by_an_extra(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the refusal names it."""
    found = read_png(asked(app, RESTORE, HEIC, "image/heic"))
    assert found.shape == (16, 16, 3)
    assert np.abs(found[2, 8].astype(int) - (220, 30, 40)).max() < 12
    assert np.abs(found[13, 8].astype(int) - (30, 40, 220)).max() < 12
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    answer = asked(app, RESTORE, HEIC, "image/heic")
    assert (answer.status_code, answer.json()["code"]) == (400, "unreadable_body")
    assert "pip install 'vae-service[heic]'" in answer.json()["detail"]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_transparent_colour_of_16_bits_is_an_opacity(app: FastAPI) -> None:
    """As PNG's chunk tRNS names it."""
    image = levels(np.uint16, *SIZE, 3)
    body = imagecodecs.png_encode(image)
    body = body[:33] + chunk(b"tRNS", struct.pack(">HHH", *map(int, image[2, 3]))) + body[33:]
    found = read_png(asked(app, RESTORE, body))
    assert np.array_equal(found[..., :3], image)
    assert found[2, 3, 3] == 0
    assert (found[..., 3] == 65535).sum() == image[..., 0].size - 1
