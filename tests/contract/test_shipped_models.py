"""The included models, as files and as served, and their figures on real digits."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray

from service.app import create_app
from service.contract.calibration import APART, BESIDE
from service.contract.corruption import operator_of
from service.operations.inference.restoration import fuse_rows, recognise_rows
from service.repository.repository import Repository
from service.settings import Settings
from training.data.mnist import read_images
from training.evaluation.measures import coverage
from training.evaluation.tasks import ENLARGING, FLIPS, Task

MODELS = Path(__file__).parent.parent.parent / "models"
SIZES = (*range(1, 18), 31, 32, 33, 63, 64)
LARGEST = 12 * 2**20
Rows = NDArray[np.float32]
RAW = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}


@pytest.fixture(scope="module")
def repository() -> Repository:
    """The shipped repository: digests checked, golden vectors replayed, warmed."""
    return Repository.open(MODELS, "", "CPUExecutionProvider", 2, 64)


@pytest.fixture(scope="module")
def digits(real_data: Path) -> Rows:
    """200 seeded MNIST test images."""
    images = read_images(real_data, "t10k-images-idx3-ubyte").numpy()
    chosen = np.random.default_rng(2013).permutation(len(images))[:200]
    return (images[chosen] / 255.0).astype(np.float32)


@asynccontextmanager
async def client(repository: Repository) -> AsyncIterator[httpx.AsyncClient]:
    """The application around the shipped models."""
    transport = httpx.ASGITransport(create_app(Settings(timeout_s=600), repository))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as one:
        yield one


def denoised(repository: Repository, y: Rows, options: str) -> Rows:
    """Denoised images from the service."""

    async def scenario() -> bytes:
        async with client(repository) as one:
            response = await one.post(
                f"/v1/models/mnist/denoise?{options}", content=y.astype(np.float32).tobytes(), headers=RAW
            )
            assert response.status_code == 200, response.text
            return response.content

    return np.frombuffer(asyncio.run(scenario()), "<f4").reshape(y.shape)


def psnr(image: Rows, clean: Rows) -> Rows:
    """PSNR of each image in decibels, data range 1."""
    decibels: Rows = -10.0 * np.log10(np.square(image - clean).reshape(len(clean), -1).mean(1))
    return decibels


def test_the_shipped_models_say_what_they_are_worth(repository: Repository) -> None:
    """mnist is the default, with at least 20 latents and its published likelihood; all models are small."""
    mnist, flat = repository.find(None, None).manifest, repository.find("mnist-2d", None).manifest
    assert mnist.name == "mnist"
    assert mnist.latent_dim is not None
    assert mnist.latent_dim >= 20
    assert flat.latent_dim == 2
    assert mnist.quality["test_nll_nats"] <= 79.7
    assert mnist.quality["importance_samples"] >= 1000
    assert mnist.quality["images"] == 10_000
    assert mnist.quality["binarisation"] == "dynamic"
    for version in MODELS.glob("*/*"):
        assert sum(path.stat().st_size for path in version.iterdir()) <= LARGEST


@pytest.mark.parametrize(("sigma", "least"), [(0.1, 30.7), (0.25, 25.3), (0.5, 21.2)])
@pytest.mark.parametrize("told", [True, False])
def test_denoising_reaches_its_figures(
    repository: Repository, digits: Rows, sigma: float, least: float, *, told: bool
) -> None:
    """PSNR on 200 seeded digits under unclipped Gaussian noise, with the level given and (within 0.3 dB) estimated."""
    y = digits + np.random.default_rng(7).normal(0.0, sigma, digits.shape)
    restored = denoised(repository, y, f"level={sigma}" if told else "level=auto")
    assert psnr(restored, digits).mean() >= least - (0.0 if told else 0.3)


@pytest.mark.parametrize("sigma", [0.02, 0.04, 0.08, 0.15, 0.3, 0.45, 0.6])
def test_denoising_makes_no_image_worse(repository: Repository, digits: Rows, sigma: float) -> None:
    """None of the 200 images gets worse at any level, against the noisy image clipped to [0, 1]."""
    y = digits + np.random.default_rng(8).normal(0.0, sigma, digits.shape)
    restored = denoised(repository, y, f"level={sigma}")
    assert np.all(psnr(restored, digits) >= psnr(np.clip(y, 0, 1), digits))


def test_the_shipped_model_is_calibrated(repository: Repository) -> None:
    """The manifest has a factor for both qualities and each kind of observed pixel."""
    manifest = repository.find("mnist", None).manifest
    assert manifest.calibration is not None
    expected = {*manifest.noise_families, BESIDE, APART, "shrink-2", "shrink-4", "blur"}
    assert {quality: set(told) for quality, told in manifest.calibration.factors.items()} == {
        "fast": expected,
        "refined": expected,
    }


@pytest.mark.parametrize("task", [FLIPS[0], ENLARGING[0]], ids=lambda task: task.name)
def test_nine_pixels_in_ten_lie_within_their_interval(repository: Repository, digits: Rows, task: Task) -> None:
    """Mean +- 1.645 std holds nine unknown pixels in ten, where the graphs alone hold less than 85 %."""
    options = "&".join(f"{name}={value}" for name, value in {**task.asked(), "uncertainty": "true"}.items())
    y = np.ascontiguousarray(task.seen(digits, 0).y, "<f4")

    async def scenario() -> bytes:
        async with client(repository) as one:
            answer = await one.post(f"/v1/models/mnist/{task.operation}?{options}", content=y.tobytes(), headers=RAW)
            assert answer.headers["x-outputs"] == "images,std"
            return answer.content

    mean, std = np.frombuffer(asyncio.run(scenario()), "<f4").reshape(len(digits), 2, *digits.shape[1:]).swapaxes(0, 1)
    assert 0.85 <= coverage(mean, std, digits) <= 0.95


@pytest.mark.parametrize(
    ("family", "share", "before", "after"), [("salt-and-pepper", 0.3, 8.4, 30.2), ("masking", 0.25, 15.9, 32.2)]
)
def test_denoising_handles_spoilt_pixels(
    repository: Repository, digits: Rows, family: str, share: float, before: float, after: float
) -> None:
    """Mean PSNR with a share of the pixels replaced equals README.md's to 0.2 dB, and every image gains."""
    rng = np.random.default_rng(9)
    replacement = rng.integers(0, 2, digits.shape) if family == "salt-and-pepper" else np.zeros(digits.shape)
    y = np.where(rng.random(digits.shape) < share, replacement, digits)
    noisy, restored = psnr(y, digits), psnr(denoised(repository, y, f"noise={family}"), digits)
    assert float(noisy.mean()) == pytest.approx(before, abs=0.2)
    assert float(restored.mean()) == pytest.approx(after, abs=0.2)
    assert np.all(restored > noisy)


def test_refinement_earns_its_time(repository: Repository, digits: Rows) -> None:
    """`quality=refined` improves 16 digits under noise of 0.5."""
    y = digits[:16] + np.random.default_rng(7).normal(0.0, 0.5, digits[:16].shape)
    fast, refined = (denoised(repository, y, f"level=0.5&seed=1&quality={quality}") for quality in ("fast", "refined"))
    assert psnr(refined, digits[:16]).mean() > psnr(fast, digits[:16]).mean()


def test_the_score_tells_digits_from_what_is_none(repository: Repository, digits: Rows) -> None:
    """Each of 50 digits has a higher ELBO than its inverted and shuffled versions and than noise."""
    rng, x = np.random.default_rng(3), digits[:50]
    others = (1 - x, rng.permuted(x.reshape(50, -1), axis=1).reshape(x.shape), rng.random(x.shape, np.float32))

    async def scenario() -> list[Rows]:
        async with client(repository) as one:
            answers = [await one.post("/v1/score?seed=1", json={"images": rows.tolist()}) for rows in (x, *others)]
            return [np.array(answer.json()["elbo"]) for answer in answers]

    scored, *rest = asyncio.run(scenario())
    assert all(scored.min() > elbo.max() for elbo in rest)


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
def test_a_photograph_is_restored(repository: Repository, *, colour: bool) -> None:
    """The default model of `denoise` takes 25/255 from a photograph, told or not, and leaves it where there is none."""
    pixels = skimage.data.astronaut()[:256, 96:352].astype(np.float32) / 255.0
    clean = pixels.transpose(2, 0, 1)[None] if colour else (pixels @ np.float32([0.299, 0.587, 0.114]))[None, None]
    noisy = (clean + 25 / 255 * np.random.default_rng(0).standard_normal(clean.shape)).astype(np.float32)

    async def scenario() -> list[float]:
        async with client(repository) as one:
            found = []
            for y, options in ((noisy, f"?noise=gaussian&level={25 / 255}"), (noisy, ""), (clean, "")):
                form = io.BytesIO()
                np.save(form, y)
                headers = {"content-type": "application/x-npy", "accept": "application/x-npy"}
                answer = await one.post(f"/v1/denoise{options}", content=form.getvalue(), headers=headers)
                assert answer.headers["x-model"] == "photo", answer.text
                found.append(float(psnr(np.load(io.BytesIO(answer.content)), clean)[0]))
            return found

    told, found, kept = asyncio.run(scenario())
    assert told >= (31.5 if colour else 30.5)
    assert found >= told - 0.1
    assert kept >= 42.0


def test_samples_look_like_digits(repository: Repository, digits: Rows) -> None:
    """Ink and contrast of samples from the prior are those of digits, within a quarter."""

    async def scenario() -> bytes:
        async with client(repository) as one:
            return (await one.post("/v1/sample?count=500&seed=1", headers={"accept": RAW["accept"]})).content

    samples = np.frombuffer(asyncio.run(scenario()), "<f4").reshape(-1, 784)
    real = digits.reshape(-1, 784)
    assert samples.mean() == pytest.approx(real.mean(), rel=0.25)
    assert samples.std() == pytest.approx(real.std(), rel=0.25)


def test_a_digit_comes_back_as_itself(repository: Repository, digits: Rows) -> None:
    """Nearly every reconstruction is nearer to its own digit than to any other of the 200."""

    async def scenario() -> bytes:
        async with client(repository) as one:
            return (await one.post("/v1/reconstruct", content=digits.tobytes(), headers=RAW)).content

    again = np.frombuffer(asyncio.run(scenario()), "<f4").reshape(200, 1, 784)
    nearest = np.square(again - digits.reshape(1, 200, 784)).sum(2).argmin(1)
    assert (nearest == np.arange(200)).mean() > 0.98


def test_an_answer_never_depends_on_its_batch_mates(repository: Repository) -> None:
    """Bit for bit: every program of every included model, at batch sizes of every remainder, first and last row."""
    rng, mnist = np.random.default_rng(0), repository.find("mnist", None)
    mnist.plan("recognise", recognise_rows, 0, None)
    mnist.plan("fuse", fuse_rows, 0, None, completions=False)
    for model in (mnist, repository.find("mnist-2d", None)):
        # An ascent's rows are states, not images: its own tests see to it.
        for key, program in [item for item in model.programs.items() if item[1].rounds == 1]:
            image, latent = model.input_shape, model.latent_shape
            operator = key[3] if program.operation == "fuse" else None
            shown = image if operator is None else operator_of(operator).seen(np.zeros(image, np.float32)).shape
            seen = [shown, shown, (len(model.manifest.noise_families),)]
            shapes = {
                "weigh": [image, (16, *latent), latent, latent],
                "decode": [latent],
                "sample": [model.noise_at(*image[1:])],
                "denoise": seen,
                "recognise": seen,
                "fuse": [latent, latent, *seen],
            }.get(program.operation, [image])
            rows = [rng.random((64, *shape), np.float32) for shape in shapes]
            if shapes[-1] == seen[-1]:
                rows[-1][::2, 1:] = 0.0  # every other image under Gaussian noise alone
            first = program.run(*(array[:1] for array in rows))
            for size in (size for size in SIZES if size * program.weight <= SIZES[-1]):
                batch = program.run(*(array[:size] for array in rows))
                last = program.run(*(array[size - 1 : size] for array in rows))
                for together, alone, single in zip(batch, first, last, strict=True):
                    assert np.array_equal(together[:1], alone)
                    assert np.array_equal(together[-1:], single)


def test_what_is_no_digit_is_told(repository: Repository, digits: Rows) -> None:
    """Of 50 test images one at most gets the note, with and without noise; inverted, black and white ones all do."""

    async def noted(operation: str, images: Rows) -> int:
        async with client(repository) as one:
            body = {"content": images.astype(np.float32).tobytes(), "headers": {**RAW, "accept": "application/json"}}
            answer = await one.post(f"/v1/models/mnist/{operation}", **body)  # type: ignore[arg-type]
            assert answer.status_code == 200, answer.text
            notes = {note["code"]: note["rows"] for note in answer.json().get("notes", [])}
            return len(notes.get("far_from_training", ()))

    few = digits[:50]
    noise = 0.25 * np.random.default_rng(3).standard_normal(few.shape)
    for operation, added in (("encode", 0.0), ("reconstruct", 0.0), ("denoise?level=0.25", noise)):
        assert asyncio.run(noted(operation, few + added)) <= 1
        for other in (1.0 - few, np.zeros_like(few), np.ones_like(few)):
            assert asyncio.run(noted(operation, other + added)) == len(few)
