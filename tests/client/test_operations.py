"""Operations of the client against the real service."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tifffile
from PIL import Image

from service.app import create_app
from service.settings import Settings
from tests.client.conftest import DIGIT, KINDS, NOISY, ROOT, SHIPPED, ask, events_of
from tests.service.conftest import serving
from vae_client import Answer, AsyncClient, Client, Progress, errors
from vae_client.client import KEY_VARIABLE, URL_VARIABLE
from vae_client.images import files_of

KEY = "alice-0123456789abcdef"


def plain(address: str, operation: str, **body: Any) -> dict[str, Any]:
    """What the service answers in JSON to a request that no client made."""
    answer = httpx.post(f"{address}/v1/{operation}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


CASES: dict[str, dict[str, Any]] = {
    "encode": {"draws": 2, "seed": 3},
    "reconstruct": {"draws": 2, "seed": 3},
    "denoise": {"noise": "gaussian", "level": 0.25, "uncertainty": True},
    "inpaint": {"draws": 2, "seed": 3, "completions": True},
    "super-resolve": {"factor": 2, "fit": "resize"},
    "score": {"draws": 4, "seed": 3, "binarise": "threshold", "error": True},
    "sample": {"count": 3, "seed": 3, "temperature": 0.5, "latents": True},
    "interpolate": {"steps": 4, "path": "linear", "latent_walk": True},
    "traverse": {"axes": "1,3", "size": 3, "seed": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", CASES)
def test_an_answer_has_the_numbers_of_the_service(operation: str, kind: str, address: str, noisy: np.ndarray) -> None:
    """Every array and field of the JSON answer to the same request, whatever went over the wire."""
    options, method = CASES[operation], operation.replace("-", "_")
    sent: dict[str, Any] = {} if operation in ("sample", "traverse") else {"images": noisy[:2]}
    if operation == "inpaint":
        sent["mask"] = np.tri(28, dtype=bool)
    found = ask(kind, address, lambda client: getattr(client, method)(**sent, **options))
    bare = {name: array.astype(np.float32).tolist() for name, array in sent.items()}
    told = plain(address, operation, **bare, **options)
    assert (found.model, found.version, found.fingerprint) == tuple(
        told.pop(name) for name in ("model", "version", "fingerprint")
    )
    assert found.seed == told.pop("seed", None)
    assert found.binarisation == told.pop("binarisation", "")
    assert [note.code for note in found.notes] == [note["code"] for note in told.pop("notes", [])]
    assert found.outputs.keys() == told.keys()
    for name, value in told.items():
        np.testing.assert_array_equal(found.outputs[name], np.array(value, np.float32), name)
        assert getattr(found, name) is found.outputs[name]
    assert found.timing.keys() <= {"queue", "inference"}


def test_one_array_is_binary_on_the_wire(client: Client, noisy: np.ndarray) -> None:
    """Requests and answers of plain arrays are .npy both ways; an answer of two shapes is JSON."""
    assert client.denoise(noisy).media_type == "application/x-npy"
    assert client.encode(noisy).media_type == "application/x-npy"
    assert client.encode(noisy, draws=1).media_type == "application/json"
    assert client.denoise(noisy, accept="json").media_type == "application/json"
    (sent,) = files_of(noisy.astype(np.float64))
    assert len(sent.content) < 4.5 * noisy.size


def test_images_may_be_anything_that_holds_them(client: Client, noisy: np.ndarray, tmp_path: Path) -> None:
    """An array, a PIL image, a path, an open file, bytes, and lists of them: the same picture has the same answer."""
    expected = client.denoise(noisy[:1], level=0.25).images
    path = tmp_path / "one.png"
    picture = Image.fromarray(np.rint(noisy[0, 0] * 255).astype(np.uint8))
    picture.save(path)
    np.save(tmp_path / "one.npy", noisy[:1])
    with path.open("rb") as file:
        every = [
            noisy[0, 0], noisy[:1].astype(np.float64), picture, path, str(path), file, path.read_bytes(), [picture],
            [path], [noisy[0]], tmp_path / "one.npy", np.rint(noisy[:1] * 255).astype(np.uint8), noisy[0, 0].tolist(),
        ]  # fmt: skip
        for number, one in enumerate(every):
            found = client.denoise(one, level=0.25).images
            np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=str(number))
    mixed = client.denoise([path, noisy[1], picture], level=0.25).images
    np.testing.assert_allclose(mixed[::2], np.concatenate([expected, expected]), atol=1e-6)
    assert mixed.shape == (3, 1, 28, 28)


def test_masks_go_with_arrays_and_with_files(client: Client, noisy: np.ndarray) -> None:
    """A mask of an array and of a picture is the one that the service sees."""
    mask = np.ones((28, 28), bool)
    mask[10:18] = False
    of_array = client.inpaint(noisy, mask=mask).images
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    np.testing.assert_array_equal(client.inpaint(noisy, mask=picture).images, of_array)
    assert np.abs(of_array - client.inpaint(noisy, mask=np.ones((28, 28), bool)).images).max() > 0.1


def test_sixteen_bits_arrive_and_come_back(client: Client, tmp_path: Path) -> None:
    """A TIFF is sent as the file that it is, so its answer in TIFF has its bits."""
    levels = np.linspace(0, 65535, 28 * 28).reshape(28, 28).astype(np.uint16)
    tifffile.imwrite(tmp_path / "scan.tif", levels)
    answer = client.reconstruct(tmp_path / "scan.tif", accept="tiff")
    assert tifffile.imread(io.BytesIO(answer.content)).dtype == np.uint16
    picture = Image.fromarray(levels)
    exact = client.reconstruct(levels.astype(np.float32) / 65535).images
    assert picture.mode == "I;16"
    np.testing.assert_array_equal(client.reconstruct(picture).images, exact)


@pytest.mark.parametrize(("accept", "form"), [("png", "PNG"), ("tiff", "TIFF"), ("gif", "GIF")])
def test_an_answer_may_be_a_file(client: Client, accept: Any, form: str, tmp_path: Path) -> None:
    """The bytes are those of the service; it opens as PIL images, and is saved as it came."""
    answer = client.sample(count=3, seed=1, accept=accept)
    assert Image.open(io.BytesIO(answer.content)).format == form
    assert len(answer.pictures()) == (1 if accept == "png" else 3)
    assert (answer.seed, answer.model) == (1, "mnist")
    answer.save(tmp_path / "it")
    assert (tmp_path / "it").read_bytes() == answer.content
    with pytest.raises(AttributeError, match=f"image/{accept}"):
        _ = answer.images


def test_arrays_become_pil_images_and_files(client: Client, tmp_path: Path) -> None:
    """Of 8 bits; .npy holds one array, .npz all and where they are from."""
    answer = client.sample(count=2, seed=1, latents=True)
    assert [picture.size for picture in answer.pictures()] == [(28, 28)] * 2
    np.testing.assert_allclose(np.asarray(answer.pictures()[0]) / 255, answer.images[0, 0], atol=0.5 / 255 + 1e-6)
    answer.save(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as file:
        assert {*file} == {"images", "latents", "model", "version", "fingerprint", "seed"}
        assert str(file["fingerprint"]) == answer.fingerprint
    with pytest.raises(errors.ClientError, match=r"\.npz"):
        answer.save(tmp_path / "all.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["all.npz"]


def test_an_output_that_is_not_there_names_those_that_are(client: Client) -> None:
    """An AttributeError, as for any attribute."""
    with pytest.raises(AttributeError, match="has no std; it has images"):
        _ = client.sample(seed=1).std


def test_latents_carry_their_fingerprint(client: Client, noisy: np.ndarray) -> None:
    """An answer of encode is decoded by the model that encoded it alone."""
    posterior = client.encode(noisy)
    decoded = client.decode(posterior)
    np.testing.assert_array_equal(decoded.images, client.decode(posterior.mean).images)
    np.testing.assert_array_equal(
        client.interpolate(between=client.encode(noisy[:2]), steps=2).images, decoded.images[:2]
    )
    with pytest.raises(errors.WrongModel, match=posterior.fingerprint):
        client.decode(posterior, model="mnist-2d")
    other = client.encode(noisy, model="mnist-2d")
    assert client.decode(other).model == "mnist-2d"  # not the default model


def test_seeds_repeat_an_answer(client: Client, noisy: np.ndarray) -> None:
    """The seed that the service chose is named, and gives the same numbers again."""
    first = client.encode(noisy, draws=1)
    assert first.seed is not None
    np.testing.assert_array_equal(client.encode(noisy, draws=1, seed=first.seed).latents, first.latents)


def test_versions_are_named_with_their_model(client: Client) -> None:
    """A version alone is no model."""
    assert client.sample(model="mnist-2d", version="1").model == "mnist-2d"
    with pytest.raises(errors.InvalidRequest, match="of which model"):
        client.sample(version="1")


@pytest.mark.parametrize("accept", ["arrays", "json"])
def test_notes_are_read_from_headers_and_from_json(client: Client, noisy: np.ndarray, accept: Any) -> None:
    """Code, rows and detail; a binary answer names 16 rows and says that there are more."""
    many, mask = np.repeat(noisy, 6, 0), np.zeros((28, 28), bool)
    (note,) = client.inpaint(many, mask=mask, accept=accept).notes
    assert note.code == "nothing_seen"
    assert note.rows == tuple(range(16 if accept == "arrays" else 18))
    assert note.more is (accept == "arrays")
    assert "prior" in note.detail


def test_the_level_is_that_of_every_image(client: Client, noisy: np.ndarray) -> None:
    """With a refined answer also the bound, which binary answers have no room for."""
    told = client.denoise(noisy)
    np.testing.assert_allclose(told.level, client.denoise(noisy, accept="json").level, atol=1e-4)
    assert client.denoise(noisy[:1], quality="refined", seed=1).elbo.shape == (1,)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (errors.InvalidShape, lambda client: client.encode(np.zeros((5, 5), np.float32))),
        (errors.InvalidValue, lambda client: client.encode(np.full((28, 28), 7.0))),
        (errors.InvalidOption, lambda client: client.denoise(np.zeros((28, 28)), level=7.0)),
        (errors.UnknownModel, lambda client: client.sample(model="nobody")),
        (errors.Unreadable, lambda client: client.encode(b"no picture")),
        (errors.UnsupportedOperation, lambda client: client.denoise(np.zeros((28, 28)), model="mnist-2d")),
        (errors.NotAcceptable, lambda client: client.sample(latents=True, accept="png")),
        (errors.TooLarge, lambda client: client.sample(count=10**6)),
        (errors.DeadlinePassed, lambda client: client.score(np.zeros((64, 28, 28)), draws=64, timeout_s=0.05)),
    ],
    ids=lambda value: value.code if isinstance(value, type) else "",
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_is_the_exception_of_its_code(
    kind: str, error: type[errors.Problem], call: Any, address: str
) -> None:
    """With the detail, the status and the id under which the service's log has it."""
    expected = (error, errors.TimedOut) if error is errors.DeadlinePassed else error
    with pytest.raises(expected) as caught:
        ask(kind, address, call)
    if isinstance(caught.value, errors.Problem):
        assert caught.value.status >= 400
        assert caught.value.request_id
        assert str(caught.value) == caught.value.detail


@pytest.mark.parametrize(
    ("says", "call"),
    [
        ("empty", lambda client: client.encode([])),
        ("no image", lambda client: client.encode(np.array(["a"]))),
        ("'rb'", lambda client: client.encode(io.StringIO("text"))),
        ("RGB", lambda client: client.encode(Image.new("CMYK", (28, 28)))),
        ("name one of them", lambda client: client.interpolate()),
        ("above 0", lambda client: client.sample(timeout_s=0)),
        ("sample has no option sead; it has count", lambda client: client.sample(sead=7)),
        ("read to its end", lambda client: client.encode(io.BytesIO())),
        ("holds no bytes", lambda client: client.encode(b"")),
    ],
)
def test_what_makes_no_request_is_not_sent(client: Client, says: str, call: Any) -> None:
    """The message names the fix."""
    with pytest.raises(errors.InvalidRequest, match=says):
        call(client)


def test_a_file_that_is_not_there_is_an_error_of_files(client: Client) -> None:
    """As Python's own."""
    with pytest.raises(FileNotFoundError):
        client.encode("nowhere.png")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_reports_and_then_answers(kind: str, address: str, noisy: np.ndarray) -> None:
    """Steps rise, previews come, and the answer is that of the plain call."""
    options: dict[str, Any] = {"quality": "refined", "level": 0.25, "seed": 4}
    *progress, answer = events_of(kind, address, lambda stream: stream.denoise(noisy, preview=True, **options))
    assert all(isinstance(event, Progress) for event in progress)
    assert [event.step for event in progress] == list(range(10, 10 * len(progress) + 1, 10))
    assert progress[0].images.shape == noisy.shape
    assert progress[0].elbo.shape == (3,)
    assert isinstance(answer, Answer)
    with Client(address) as client:
        whole = client.denoise(noisy, **options)
    np.testing.assert_array_equal(answer.images, whole.images)
    assert (answer.model, answer.seed) == ("mnist", 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_refused_raises(kind: str, address: str) -> None:
    """Before its first event, as the exception of the code."""
    with pytest.raises(errors.UnknownModel):
        events_of(kind, address, lambda stream: stream.sample(model="nobody"))


def test_a_stream_may_be_left(address: str, noisy: np.ndarray) -> None:
    """Its connection closes, and the client asks on."""
    with Client(address) as client:
        for event in client.stream.denoise(noisy, quality="refined"):
            assert isinstance(event, Progress)
            break
        assert client.live() == {"live": True}


def test_models_are_described_loaded_and_unloaded(address: str) -> None:
    """As the service describes them; a load that is refused is an exception."""
    with Client(address) as client:
        assert {one["model"] for one in client.models()["models"]} == SHIPPED
        assert (
            client.model("mnist")["fingerprint"]
            == client.model("mnist", client.model("mnist")["version"])["fingerprint"]
        )
        assert client.card("mnist").startswith("# mnist")
        assert client.ready()["ready"]
        assert client.ready("mnist", client.model("mnist")["version"])["ready"]
        client.unload("mnist-ladder")
        with pytest.raises(errors.NotReady):
            client.ready("mnist-ladder", timeout_s=0.5)
        client.load("mnist-ladder")
        assert client.ready("mnist-ladder")["ready"]


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    """A service that wants a key."""
    keys = tmp_path / "keys"
    keys.write_text(f"alice {KEY} infer\n")
    keys.chmod(0o600)
    with serving(
        create_app(
            Settings(models=ROOT / "models", default_model="mnist-2d", versions="mnist-2d:latest", api_keys=str(keys))
        )
    ) as url:
        yield url


@pytest.mark.usefixtures("clean_environment")
def test_address_and_key_come_from_the_environment(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments win; without an address the message names all ways to give one."""
    with pytest.raises(errors.NoAddress, match=r"url= .*VAE_CLIENT_URL.*--local"):
        Client()
    monkeypatch.setenv(URL_VARIABLE, guarded)
    with Client() as client, pytest.raises(errors.Unauthenticated):
        client.sample()
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with Client() as client:
        assert client.sample(seed=1).model == "mnist-2d"
        with pytest.raises(errors.Forbidden):
            client.load("mnist-2d")
    with Client(key="another") as client, pytest.raises(errors.Unauthenticated):
        client.sample()


def test_an_address_without_a_scheme_is_refused() -> None:
    """The message writes it as it should be."""
    with pytest.raises(errors.InvalidRequest, match="write http://localhost:8000"):
        Client("localhost:8000")


def test_an_address_may_have_a_path(noisy: np.ndarray) -> None:
    """Behind a proxy that serves the service under a path."""
    settings = Settings(models=ROOT / "models", default_model="mnist-2d", versions="mnist-2d:latest", root_path="/vae")
    with serving(create_app(settings)) as url, Client(f"{url}/vae/") as client:
        assert client.encode(noisy).mean.shape == (3, 2)
        assert client.live() == {"live": True}


def test_many_calls_of_an_async_client_run_at_a_time(address: str) -> None:
    """Each has the answer to its own request."""

    async def run() -> list[Answer]:
        async with AsyncClient(address) as client:
            return await asyncio.gather(*(client.sample(seed=seed) for seed in range(20)))

    found = asyncio.run(run())
    assert [answer.seed for answer in found] == list(range(20))
    assert len({answer.images.tobytes() for answer in found}) == 20


def test_what_is_told_of_an_answer_is_json(client: Client) -> None:
    """For logs and tables."""
    told = client.score(DIGIT, seed=2).about()
    assert json.loads(json.dumps(told)) == told
    assert told["seed"] == 2
    assert client.denoise(NOISY).about()["timing_ms"].keys() == {"queue", "inference"}


@pytest.mark.parametrize("kind", KINDS)
def test_loopback_needs_no_proxy(kind: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment names for other addresses."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert ask(kind, address, lambda client: client.live()) == {"live": True}
    assert ask(kind, address.replace("127.0.0.1", "localhost"), lambda client: client.live()) == {"live": True}
