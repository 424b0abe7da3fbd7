"""`remote_decode` and `remote_encode` of diffusers, as they are, against the module's own code, and what is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from PIL import Image

from service.app import create_app
from service.codecs.payload import from_bfloat16, to_bfloat16
from service.repository.repository import Repository
from service.settings import Settings
from tests.support.versions import free_version, opened
from training.importing.autoencoder_kl import import_diffusers

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip("diffusers", reason="needs the extra `diffusers`")
remote = pytest.importorskip("diffusers.utils.remote_utils", reason="needs a diffusers with remote VAEs")

SIDE = 512
FACTORS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
LIMITS = {torch.float32: (1e-4, 1e-4), torch.float16: (1e-3, 1e-2), torch.bfloat16: (8e-3, 8e-2)}
"""Mean and largest difference by type. bfloat16 has three bits fewer than float16."""


class Served(NamedTuple):
    """A module, and where the service serves it."""

    vae: Any
    url: str

    def plain_decode(self, latents: torch.Tensor) -> torch.Tensor:
        """What the module itself makes of latents in float32."""
        with torch.no_grad():
            return self.vae.decode(latents.float() / FACTORS["scaling_factor"] + FACTORS["shift_factor"]).sample

    def decode(self, latents: torch.Tensor, **asked: Any) -> Any:
        """What `remote_decode` gives."""
        return remote.remote_decode(f"{self.url}/decode", latents, **{**FACTORS, "do_scaling": True, **asked})


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, serve: Callable[[FastAPI], AbstractContextManager[str]]
) -> Iterator[Served]:
    """A small AutoencoderKL with random weights, whose images go beyond [-1, 1], imported."""
    folder = tmp_path_factory.mktemp("remote")
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    small = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}
    vae = diffusers.AutoencoderKL(**small, **blocks, **FACTORS, sample_size=SIDE, mid_block_add_attention=False).eval()
    with torch.no_grad():  # so that images go a little beyond [-1, 1]
        most = vae.decode(torch.randn(1, 4, 16, 16)).sample.abs().max()
        for weight in vae.decoder.conv_out.parameters():
            weight.mul_(1.5 / most)
    vae.save_pretrained(folder / "vae")
    import_diffusers(folder / "vae", folder / "models", "sd-vae", "1")
    with serve(create_app(Settings(models=folder / "models", threads=1, timeout_s=300))) as url:
        yield Served(vae, f"{url}/diffusers/sd-vae")


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    """Those of one image of 512 x 512, on the wire's scale."""
    return torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(5))


def assert_close(found: torch.Tensor, known: torch.Tensor, kind: torch.dtype) -> None:
    assert (found.shape, found.dtype) == (known.shape, kind)
    difference = (found.float() - known).abs()
    mean, most = LIMITS[kind]
    assert difference.mean() <= mean
    assert difference.max() <= most


@pytest.mark.parametrize("kind", LIMITS)
def test_a_remote_decode_is_the_modules_own(served: Served, latents: torch.Tensor, kind: torch.dtype) -> None:
    """In [-1, 1] and beyond, of the type that was sent; the factors are applied here."""
    sent = latents.to(kind)
    known = served.plain_decode(sent)
    assert known.abs().max() > 1.0
    assert_close(served.decode(sent, output_type="pt", return_type="pt"), known, kind)


def test_levels_come_with_channels_last(served: Served, latents: torch.Tensor) -> None:
    """`partial_postprocess`: uint8, rounded as VaeImageProcessor does, for all images of the request."""
    both = torch.cat([latents, latents.flip(-1)])
    found = served.decode(both, output_type="pt", return_type="pt", partial_postprocess=True)
    known = ((served.plain_decode(both) / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
    assert (found.shape, found.dtype) == ((2, SIDE, SIDE, 3), torch.uint8)
    assert (found.float() - known).abs().max() <= 0.51
    pictures = served.decode(both, output_type="pt", return_type="pil", partial_postprocess=True)
    assert [picture.size for picture in pictures] == [(SIDE, SIDE)] * 2


@pytest.mark.parametrize(("form", "most"), [("png", 0.51), ("jpg", 40)])
def test_a_picture_is_made_here(served: Served, latents: torch.Tensor, form: Any, most: float) -> None:
    """The default of `remote_decode`, in both formats."""
    found = served.decode(latents, image_format=form)
    assert found.format == ("jpeg" if form == "jpg" else "png")
    known = ((served.plain_decode(latents)[0] / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    difference = np.abs(np.asarray(found, np.float32) - known)
    assert difference.max() <= most
    assert difference.mean() <= 3


def test_processors_of_the_client_work(served: Served, latents: torch.Tensor) -> None:
    """VaeImageProcessor takes [-1, 1]; a picture with a processor is a tensor in [0, 1]."""
    processor = diffusers.image_processor.VaeImageProcessor()
    known = served.decode(latents, image_format="png")
    one = served.decode(latents, processor=processor, output_type="pt", return_type="pil")
    (other,) = served.decode(latents, processor=processor, output_type="pil")
    for picture in (one, other):
        assert np.abs(np.asarray(picture, np.int16) - np.asarray(known, np.int16)).max() <= 1


def test_factors_may_be_applied_by_the_caller_or_be_those_of_the_model(served: Served, latents: torch.Tensor) -> None:
    """`do_scaling` alone asks for the model's own; without it and without factors, latents are the model's."""
    known = served.plain_decode(latents)
    asked = {"output_type": "pt", "return_type": "pt", "scaling_factor": None, "shift_factor": None}
    with pytest.warns(FutureWarning, match="do_scaling"):
        assert_close(served.decode(latents, **asked), known, torch.float32)
    own = latents / FACTORS["scaling_factor"] + FACTORS["shift_factor"]
    assert_close(served.decode(own, **asked, do_scaling=False), known, torch.float32)


def test_packed_latents_are_unpacked(served: Served, latents: torch.Tensor) -> None:
    """As Flux has them: blocks of two by two in a row."""
    size = SIDE // 8
    blocks = latents.view(1, 4, size // 2, 2, size // 2, 2)  # as FluxPipeline._pack_latents, which needs transformers
    packed = blocks.permute(0, 2, 4, 1, 3, 5).reshape(1, size * size // 4, 16)
    found = served.decode(packed, output_type="pt", return_type="pt", height=SIDE, width=SIDE)
    assert_close(found, served.plain_decode(latents), torch.float32)


@pytest.mark.parametrize("kind", LIMITS)
def test_a_remote_encode_is_the_modules_mean(served: Served, kind: torch.dtype) -> None:
    """Of a tensor, which may lie beyond [-1, 1]; the factors are applied here."""
    x = 2.2 * torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) - 1.1
    sent = x.to(kind)
    with torch.no_grad():
        mean = served.vae.encode(sent.float()).latent_dist.mean
    found = remote.remote_encode(f"{served.url}/encode", sent, **FACTORS)
    assert_close(found, (mean - FACTORS["shift_factor"]) * FACTORS["scaling_factor"], kind)
    assert_close(remote.remote_encode(f"{served.url}/encode", sent), mean, kind)


def test_a_picture_is_encoded(served: Served) -> None:
    """Sent as PNG without a media type; a size that is no multiple of 8 is padded."""
    levels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    x = torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        mean = served.vae.encode(x).latent_dist.mean
    found = remote.remote_encode(f"{served.url}/encode", Image.fromarray(levels))
    assert_close(found, mean, torch.float32)
    odd = remote.remote_encode(f"{served.url}/encode", Image.fromarray(levels[:61, :90]))
    assert odd.shape == (1, 4, 8, 12)


def test_a_refusal_is_raised_by_the_client(served: Served, latents: torch.Tensor) -> None:
    """`RuntimeError` with the problem, which names the fix."""
    with pytest.raises(RuntimeError, match="one image of 1 or 3 channels"):
        served.decode(torch.cat([latents, latents]), image_format="png")
    with pytest.raises(RuntimeError, match="output_type"):
        served.decode(latents, output_type="mp4")
    with pytest.raises(RuntimeError, match="no image of model sd-vae has latents of shape"):
        served.decode(latents[:, :, :1, :1], output_type="pt", return_type="pt")
    with pytest.raises(RuntimeError, match="no model"):
        remote.remote_decode(served.url.replace("sd-vae", "none") + "/decode", latents, **FACTORS)


def test_the_program_of_the_page_runs(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/clients.md, with the address of this service."""
    page = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
    (program,) = re.findall(r"^```python\n(import torch\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(program.replace("http://127.0.0.1:8000/diffusers/sd-vae", served.url), {})  # noqa: S102  # our own page
    assert capsys.readouterr().out == "(512, 512) torch.Size([1, 4, 64, 64])\n"


def test_bfloat16_is_rounded_as_torch_does() -> None:
    """To the nearest, of two to the even one; back without loss."""
    bits = np.random.default_rng(0).integers(0, 2**32, 10**5, np.uint64).astype(np.uint32)
    ties = np.arange(0x3F800000, 0x3F800000 + 2**20, 2**15, np.uint32)
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    known = torch.from_numpy(values).to(torch.bfloat16)
    found = to_bfloat16(values)
    np.testing.assert_array_equal(found, known.view(torch.uint16).numpy())
    np.testing.assert_array_equal(from_bfloat16(found), known.float().numpy())


@pytest.fixture(scope="module")
def client(
    tmp_path_factory: pytest.TempPathFactory, small: Repository, serve: Callable[[FastAPI], AbstractContextManager[str]]
) -> Iterator[httpx.Client]:
    """A client of a model for grey and colour of any size, and of one whose latents are vectors."""
    free = opened(free_version(tmp_path_factory.mktemp("free") / "free" / "1", (1, 3)))
    settings = Settings(memory_bytes=2**23, max_body_bytes=2**20)
    repository = Repository({**small.models, "free": {"1": free}}, "free")
    with serve(create_app(settings, repository)) as url, httpx.Client(base_url=f"{url}/diffusers", timeout=60) as one:
        yield one


Z = np.zeros((1, 2, 2, 2), "<f4")
SHAPE = {"shape": [*Z.shape], "dtype": "float32"}
HALF, WHOLE = ({"shape": [1, 1, 28, 28], "dtype": kind} for kind in ("float16", "float32"))
PACKED = {"shape": [1, 1, 8], "dtype": "float32", "output_type": "pt"}
BAD: dict[str, tuple[str, dict[str, Any], bytes, int, str]] = {
    "no shape": ("free/decode", {}, Z.tobytes(), 422, "send its shape and dtype"),
    "no type": ("free/decode", {"shape": [1, 2, 2, 2]}, Z.tobytes(), 422, "send both"),
    "a type of levels": ("free/decode", {**SHAPE, "dtype": "uint8"}, bytes(8), 422, "tensor of floats"),
    "an unknown type": ("free/decode", {**SHAPE, "dtype": "float64"}, bytes(64), 422, "float32"),
    "too few bytes": ("free/decode", SHAPE, Z.tobytes()[:-1], 422, "has 32 bytes, and the body has 31"),
    "nothing": ("free/decode", SHAPE, b"", 422, "the body has 0"),
    "a huge shape": ("free/decode", {**SHAPE, "shape": [2**40] * 4}, Z.tobytes(), 422, "bytes"),
    "a shape of nothing": ("free/decode", {**SHAPE, "shape": [0, 2, 2, 2]}, b"", 422, "greater than or equal to 1"),
    "a long shape": ("free/decode", {**SHAPE, "shape": [1] * 5}, bytes(4), 422, "shape"),
    "many axes": ("free/decode", {**SHAPE, "shape": [1] * 40}, bytes(4), 422, "more than 32"),
    "an unknown parameter": ("free/decode", {**SHAPE, "seed": 1}, Z.tobytes(), 422, "seed"),
    "a parameter twice": ("free/decode", {**SHAPE, "image_format": ["png", "jpg"]}, Z.tobytes(), 422, "twice"),
    "no scale": ("free/decode", {**SHAPE, "scaling_factor": 0}, Z.tobytes(), 422, "scaling_factor"),
    "no number": ("free/decode", {**SHAPE, "shift_factor": "nan"}, Z.tobytes(), 422, "shift_factor"),
    "a film": ("free/decode", {**SHAPE, "output_type": "mp4"}, Z.tobytes(), 422, "output_type"),
    "a scale below float32": ("free/decode", {**SHAPE, "scaling_factor": 1e-320}, (Z + 1).tobytes(), 422, "finite"),
    "a shift above float32": ("free/decode", {**SHAPE, "shift_factor": 1e300}, Z.tobytes(), 422, "finite"),
    "a large scale": ("mnist-2d/encode", {**HALF, "scaling_factor": 1e9}, bytes(2 * 784), 422, "float16 cannot hold"),
    "a huge scale": ("mnist-2d/encode", {**WHOLE, "scaling_factor": 1e300}, bytes(4 * 784), 422, "float32 cannot hold"),
    "another size": ("mnist-2d/encode", {**WHOLE, "shape": [1, 1, 7, 7]}, bytes(4 * 49), 422, "fit=resize"),
    "an unknown fit": ("mnist-2d/encode", {**WHOLE, "fit": "tile"}, bytes(4 * 784), 422, "resize"),
    "NaN": ("free/decode", SHAPE, (Z + np.nan).tobytes(), 422, "finite"),
    "other channels": ("free/decode", {**SHAPE, "shape": [1, 4, 1, 2]}, Z.tobytes(), 422, "(n, 2, any, any)"),
    "packed without a size": ("free/decode", PACKED, Z.tobytes(), 422, "any"),
    "packed of another size": ("free/decode", {**PACKED, "height": 16, "width": 16}, Z.tobytes(), 422, "do not fit"),
    "packed vectors": ("mnist-2d/decode", {**PACKED, "height": 28, "width": 28}, Z.tobytes(), 422, "planes"),
    "no picture": ("free/encode", {}, b"not a picture", 400, "picture"),
    "an empty body": ("free/encode", {}, b"", 400, "picture"),
    "one number": ("free/encode", {"shape": [1], "dtype": "float32"}, bytes(4), 422, "(n, channels, height, width)"),
    "two channels": ("free/encode", SHAPE, Z.tobytes(), 422, "(n, 1 or 3, height, width)"),
    "a form of the answer": ("free/encode", {**SHAPE, "output_type": "pt"}, Z.tobytes(), 422, "output_type"),
    "no such model": ("none/encode", SHAPE, Z.tobytes(), 404, "no model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(client: httpx.Client, case: str) -> None:
    """A problem in JSON, which the client reads, with the status of `/v1`."""
    path, query, body, status, says = BAD[case]
    answer = client.post(f"/{path}", params=query, content=body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert says in answer.json()["detail"], answer.text


def test_another_size_is_fitted_where_the_address_says_so(client: httpx.Client) -> None:
    """As an error advises: callers of `remote_encode` choose the address, and with it the query string."""
    image = np.zeros((1, 1, 56, 56), "<f4")
    small, large = (
        client.post(
            "/mnist-2d/encode", params={**WHOLE, **further}, content=image[:, :, : 28 * side, : 28 * side].tobytes()
        )
        for side, further in ((1, {}), (2, {"shape": [*image.shape], "fit": "resize"}))
    )
    assert (small.status_code, large.status_code) == (200, 200), large.text
    np.testing.assert_allclose(np.frombuffer(small.content, "<f4"), np.frombuffer(large.content, "<f4"), atol=1e-5)


def test_limits_hold_and_memory_comes_back(client: httpx.Client) -> None:
    """Of bodies and of memory, whose estimate is made before anything is computed."""
    side = 200
    large = client.post("/free/decode", params=SHAPE, content=bytes(2**20 + 1))
    assert (large.status_code, "VAE_MAX_BODY_BYTES" in large.json()["detail"]) == (413, True)
    for _ in range(3):
        query = {"shape": [1, 2, side, side], "dtype": "float32", "output_type": "pt"}
        answer = client.post("/free/decode", params=query, content=bytes(2 * side * side * 4))
        assert (answer.status_code, "VAE_MEMORY_BYTES" in answer.json()["detail"]) == (413, True)
    answer = client.post("/free/decode", params={**SHAPE, "output_type": "pt"}, content=Z.tobytes())
    assert answer.status_code == 200
    assert json.loads(answer.headers["shape"]) == [1, 1, 8, 8]
    assert (answer.headers["dtype"], answer.headers["x-model"]) == ("float32", "free")
    old = client.post("/free/decode", content=b"{}", headers={"content-type": "tensor/base64"})
    assert old.status_code == 415
