"""Models brought in and taken out while the service serves."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app, open_repository
from service.repository.progress import logged
from service.repository.repository import ModelFolder, Repository
from service.repository.selection import Selection
from service.repository.version import open_model
from service.runtime.model import Model
from service.settings import Settings

RAW = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}
Z = np.zeros((3, 2), "<f4")
URL = "http://x/v1/models/mnist-2d"
CALLERS = 2
Brighter = Callable[..., Path]
Seal = Callable[..., None]


@asynccontextmanager
async def client(
    models: Path, repository: Repository | None = None, **further: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """The application around a repository, with model control."""
    settings = Settings(models=models, **{"max_rows": 8, "threads": 1, "model_control": "anonymous", **further})
    app = create_app(settings, repository)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=URL, timeout=60) as one,
    ):
        yield one


async def conditions(one: httpx.AsyncClient) -> dict[str, tuple[str, str]]:
    """What is said of every version: its state and the reason."""
    content = (await one.get(URL)).json()
    return {known["version"]: (known["state"], known["reason"]) for known in content["states"]}


async def version(one: httpx.AsyncClient) -> str:
    """Which version answers where none is named."""
    answer = await one.post("/decode", content=Z.tobytes(), headers=RAW)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-model-version"]


async def eventually(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await true():  # noqa: ASYNC110  # what is waited for is on the other side of HTTP
            await asyncio.sleep(0.02)


def spoil_golden(folder: Path, seal: Seal) -> None:
    with np.load(folder / "golden.npz") as file:
        golden = dict(file)
    golden["decoder/x_mean"] = golden["decoder/x_mean"] + np.float32(0.01)
    np.savez(folder / "golden.npz", **golden)
    seal(folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def ask(url: str, enough: threading.Event) -> list[tuple[int, str, bytes]]:
    """Requests one after the other until it is enough: status, version and body of every answer."""
    answers = []
    with httpx.Client(base_url=url, timeout=60) as one:
        while not enough.is_set():
            answer = one.post("/v1/decode", content=Z.tobytes(), headers=RAW)
            answers.append((answer.status_code, answer.headers.get("x-model-version", ""), answer.content))
    return answers


def test_a_new_version_takes_over_and_no_request_is_lost(
    flat_models: Path, brighter: Brighter, serve: Callable[[FastAPI], AbstractContextManager[str]]
) -> None:
    """Under steady load every request is answered, by the version it says, which changes once; the old one is freed."""
    settings = Settings(models=flat_models, versions="latest", model_control="anonymous", max_rows=8, threads=1)
    repository = open_repository(settings)
    old = weakref.ref(repository.find(None, None))
    expected = {"1": repository.find(None, None).graphs["decoder"](Z)[0].tobytes()}
    enough = threading.Event()
    with serve(create_app(settings, repository)) as url, ThreadPoolExecutor(CALLERS) as pool:
        callers = [pool.submit(ask, url, enough) for _ in range(CALLERS)]
        folder = brighter(flat_models, "2")
        loaded = httpx.post(f"{url}/v1/models/mnist-2d/load", timeout=60)
        expected["2"] = open_model(folder, "CPUExecutionProvider", 1, 8).graphs["decoder"](Z)[0].tobytes()
        enough.set()
        answers = [caller.result() for caller in callers]
        assert old() is None
    assert (loaded.status_code, loaded.json()["states"]) == (
        200,
        [
            {"version": "1", "state": "unloaded", "reason": "VAE_VERSIONS is latest"},
            {"version": "2", "state": "ready", "reason": ""},
        ],
    )
    assert expected["1"] != expected["2"]
    for of_one in answers:
        versions = [version for _, version, _ in of_one]
        assert versions == sorted(versions)
        assert set(versions) == {"1", "2"}
        assert all(answer == (200, answer[1], expected[answer[1]]) for answer in of_one)


def test_a_load_does_not_hold_up_the_event_loop(flat_models: Path, brighter: Brighter) -> None:
    """The loop's longest stall is a small part of the time that opening takes."""
    brighter(flat_models, "2")

    async def scenario() -> tuple[float, float]:
        async with client(flat_models, versions="mnist-2d:1", max_rows=256) as one:
            loading, stalls = asyncio.create_task(one.post("/versions/2/load")), [0.0]
            began = last = time.perf_counter()
            while not loading.done():
                await asyncio.sleep(0.001)
                now = time.perf_counter()
                stalls.append(now - last)
                last = now
            assert loading.result().status_code == 200
            return max(stalls), last - began

    stall_s, load_s = asyncio.run(scenario())
    assert stall_s < load_s / 2


BAD = [
    (lambda folder, _: (folder / "manifest.json").unlink(), "mnist-2d/2/manifest.json: No such file"),
    (lambda folder, _: cut(folder / "decoder.onnx"), "mnist-2d/2/decoder.onnx does not match the SHA-256"),
    (lambda folder, seal: (cut(folder / "decoder.onnx"), seal(folder)), "mnist-2d/2 cannot be opened"),
    (spoil_golden, "decoder is off its golden vectors by 0.01 (at most 0.001)"),
]


def test_a_bad_version_leaves_the_old_serving_and_says_why(flat_models: Path, brighter: Brighter, seal: Seal) -> None:
    """No manifest, a wrong digest, a truncated graph, golden vectors that are off; once mended it is loaded."""

    async def scenario() -> None:
        async with client(flat_models, versions="latest") as one:
            for spoil, reason in BAD:
                folder = brighter(flat_models, "2")
                spoil(folder, seal)
                for path in ("/versions/2/load", "/load"):
                    refused = await one.post(path)
                    assert (refused.status_code, refused.json()["code"]) == (409, "load_refused")
                    assert refused.json()["detail"].startswith("version 2: ")
                    assert reason in refused.json()["detail"]
                assert str(flat_models) not in refused.text
                found = await conditions(one)
                assert found["1"] == ("ready", "")
                assert found["2"][0] == "failed"
                assert reason in found["2"][1]
                assert await version(one) == "1"
                assert reason in (await one.get("http://x/health/ready")).json()["failed"][0]
            assert (await one.post("/versions/2/unload")).status_code == 200
            assert "failed" not in (await one.get("http://x/health/ready")).json()
            brighter(flat_models, "2")
            assert (await one.post("/load")).status_code == 200
            assert await version(one) == "2"
            assert "failed" not in (await one.get("http://x/health/ready")).json()

    asyncio.run(scenario())


def test_a_graph_spoilt_after_it_was_loaded_is_not_ready_again(flat_models: Path) -> None:
    """Digests are checked anew at every load, though the manifest is the same; what was loaded goes on serving."""

    async def scenario() -> None:
        async with client(flat_models) as one:
            decoder = flat_models / "mnist-2d/1/decoder.onnx"
            whole = decoder.read_bytes()
            decoder.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            for path in ("/versions/1/load", "/load"):
                refused = await one.post(path)
                assert (refused.status_code, refused.json()["code"]) == (409, "load_refused")
                assert "decoder.onnx does not match the SHA-256" in refused.json()["detail"]
            assert "does not match" in (await conditions(one))["1"][1]
            assert await version(one) == "1"
            decoder.write_bytes(whole)
            assert (await one.post("/load")).status_code == 200
            assert (await conditions(one))["1"] == ("ready", "")

    asyncio.run(scenario())


@pytest.mark.parametrize("when", ["opened", "run"])
def test_loads_go_on_after_one_that_hung(
    flat_models: Path,
    brighter: Brighter,
    hanging: Callable[[Path, str], None],
    when: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is refused when its time is up, and the log tells of it before; others, or FIFOs, do not wait for it."""
    caplog.set_level(logging.INFO, "service")

    async def scenario() -> None:
        async with client(flat_models, versions="latest", load_limit_s=3.0) as one:
            hanging(brighter(flat_models, "2"), when)
            folder = brighter(flat_models, "3")
            (folder / "manifest.json").unlink()
            os.mkfifo(folder / "manifest.json")
            for number, reason in (("2", "VAE_LOAD_LIMIT_S"), ("3", "not a regular file")):
                refused = await one.post(f"/versions/{number}/load")
                assert (refused.status_code, refused.json()["code"]) == (409, "load_refused")
                assert reason in refused.json()["detail"]
            assert await version(one) == "1"
            brighter(flat_models, "4")
            assert (await one.post("/versions/4/load")).status_code == 200
            assert await version(one) == "4"

    asyncio.run(scenario())
    assert re.search(r"model mnist-2d version 2 is loading: trial: [\w ]+, [23] s so far$", caplog.text, re.MULTILINE)


STEPS = [
    "trial: starting",
    "trial: reading",
    *(f"trial: opening {number} of 2 graphs" for number in (1, 2)),
    "trial: replaying its golden rows",
    "trial: warming up",
    "reading",
    *(f"opening {number} of 2 graphs" for number in (1, 2)),
    "replaying its golden rows",
]


def test_every_step_of_a_load_is_told(flat_models: Path) -> None:
    """Those of the process that tries the version, then those of the one that serves it."""
    steps: list[str] = []
    open_model(flat_models / "mnist-2d" / "1", "CPUExecutionProvider", 2, 8, tell=steps.append)
    assert steps == STEPS


def test_what_is_loading_says_how_far_it_is(flat_models: Path) -> None:
    """With its seconds, in /v1/models and in the readiness of model, version and a service that has nothing else."""

    async def scenario() -> None:
        async with client(flat_models) as one:
            await one.post("/unload")
            load = asyncio.create_task(one.post("/load"))
            told = re.compile(rf"(starting|{'|'.join(STEPS)}), \d+ s so far")

            async def loading() -> bool:
                return (await conditions(one))["1"][0] == "loading"

            await eventually(loading)
            assert told.fullmatch((await conditions(one))["1"][1])
            for path in ("/ready", "/versions/1/ready", "http://x/health/ready"):
                answer = await one.get(path)
                assert answer.status_code == 503
                assert re.search(f"version 1 is loading: {told.pattern}$", answer.json()["detail"])
            assert (await load).status_code == 200
            assert await conditions(one) == {"1": ("ready", "")}
            assert (await one.get("http://x/health/ready")).json() == {"ready": True, "models": ["mnist-2d"]}

    asyncio.run(scenario())


def test_a_long_load_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """At growing intervals, and no longer than it lasts."""
    caplog.set_level(logging.INFO, "service")
    with logged(lambda: "still loading", first_s=0.05):
        time.sleep(0.5)
    assert 1 <= len(caplog.messages) <= 3, "after 0.05, 0.15 and 0.35 s"
    assert set(caplog.messages) == {"still loading"}
    count = len(caplog.messages)
    time.sleep(0.3)
    assert len(caplog.messages) == count


def test_files_deleted_or_cut_while_serving_harm_nothing(flat_models: Path) -> None:
    """What is served was read at the start; a load says that the folder is no good, and changes nothing."""

    async def scenario() -> None:
        async with client(flat_models) as one:
            cut(flat_models / "mnist-2d/1/decoder.onnx")
            assert await version(one) == "1"
            shutil.rmtree(flat_models / "mnist-2d")
            assert (await one.post("/load")).status_code == 409
            state, reason = (await conditions(one))["1"]
            assert (state, "No such file" in reason) == ("ready", True)
            assert await version(one) == "1"

    asyncio.run(scenario())


def test_a_version_changed_under_its_number_is_loaded_again_when_asked(flat_models: Path, brighter: Brighter) -> None:
    """Its fingerprint tells; a spoilt one leaves what was served before."""

    async def scenario() -> None:
        async with client(flat_models) as one:
            first = (await one.get(URL)).json()["fingerprint"]
            folder = brighter(flat_models, "1")
            cut(folder / "decoder.onnx")
            assert (await one.post("/versions/1/load")).status_code == 409
            assert (await one.get(URL)).json()["fingerprint"] == first
            brighter(flat_models, "1")
            assert (await one.post("/versions/1/load")).status_code == 200
            described = (await one.get("/versions/1")).json()
            assert described["fingerprint"] != first
            assert (described["state"], described["reason"]) == ("ready", "")

    asyncio.run(scenario())


def test_an_unloaded_model_is_not_ready_until_it_is_loaded(flat_models: Path) -> None:
    """Readiness, requests and metrics say so; what is unloaded can be looked up."""

    async def ready_versions(one: httpx.AsyncClient) -> float:
        families = text_string_to_metric_families((await one.get("http://x/metrics")).text)
        (sample,) = next(family for family in families if family.name == "vae_ready_versions").samples
        assert sample.labels == {"model": "mnist-2d"}
        return sample.value

    async def scenario() -> None:
        async with client(flat_models) as one:
            assert (await one.get("http://x/health/ready")).status_code == 200
            assert await ready_versions(one) == 1
            unloaded = await one.post("/versions/1/unload")
            assert unloaded.json() == {
                "model": "mnist-2d",
                "states": [{"version": "1", "state": "unloaded", "reason": "unloaded by request"}],
                "workers": 1,
                "followed": 1,
            }
            assert await ready_versions(one) == 0
            for answer in (await one.get("http://x/health/ready"), await one.post("http://x/v1/sample")):
                assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
            assert (await one.get("http://x/v1/models")).json()["models"] == [(await one.get(URL)).json()]
            assert (await one.get("/versions/1")).json()["state"] == "unloaded"
            assert (await one.post("/load")).status_code == 200
            assert (await one.get("http://x/health/ready")).status_code == 200
            assert (await one.post("/unload")).status_code == 200
            assert (await one.post("http://x/v1/sample")).status_code == 503

    asyncio.run(scenario())


def test_unloading_the_latest_brings_back_the_one_before(flat_models: Path, brighter: Brighter) -> None:
    """A rollback; loading the model again is going forward."""
    brighter(flat_models, "2")

    async def scenario() -> list[str]:
        async with client(flat_models, versions="latest") as one:
            seen = [await version(one)]
            for path in ("/versions/2/unload", "/load"):
                assert (await one.post(path)).status_code == 200
                seen.append(await version(one))
            return seen

    assert asyncio.run(scenario()) == ["2", "1", "2"]


def test_the_folder_is_polled_for_versions_that_are_whole(flat_models: Path, brighter: Brighter) -> None:
    """One that is still being copied fails, and is served once it is complete; a new model comes in too."""

    async def scenario() -> None:
        async with client(flat_models, versions="latest", model_control=False, poll_s=0.02) as one:
            assert await version(one) == "1"
            brighter(flat_models, "2")
            await eventually(lambda: is_in(one, "2", "ready"))
            assert await version(one) == "2"
            (flat_models / "mnist-2d" / "3").mkdir()
            await eventually(lambda: is_in(one, "3", "failed"))
            assert await version(one) == "2"
            brighter(flat_models, "3")
            await eventually(lambda: is_in(one, "3", "ready"))
            assert await version(one) == "3"
            brighter(flat_models, "1", "newcomer")
            await eventually(lambda: is_served(one, "newcomer"))

    async def is_in(one: httpx.AsyncClient, version: str, state: str) -> bool:
        return (await conditions(one)).get(version, ("",))[0] == state

    async def is_served(one: httpx.AsyncClient, model: str) -> bool:
        return (await one.post(f"http://x/v1/models/{model}/sample")).status_code == 200

    asyncio.run(scenario())


def sign(folder: Path, key: Ed25519PrivateKey) -> None:
    (folder / "manifest.json.sig").write_bytes(key.sign((folder / "manifest.json").read_bytes()))


def test_signatures_are_checked_at_every_load(flat_models: Path, tmp_path: Path) -> None:
    """A bad one refuses what lies in the folder, and what is served stays; keys are read anew, so another will do."""
    ours, theirs = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    keys, folder = tmp_path / "keys.pem", flat_models / "mnist-2d" / "1"
    public = [key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in (ours, theirs)]
    keys.write_bytes(public[0])
    sign(folder, ours)

    async def scenario() -> None:
        async with client(flat_models, model_public_keys=str(keys)) as one:
            sign(folder, theirs)
            refused = await one.post("/versions/1/load")
            assert (refused.status_code, refused.json()["code"]) == (409, "load_refused")
            assert "mnist-2d/1/manifest.json.sig is by no key of VAE_MODEL_PUBLIC_KEYS" in refused.json()["detail"]
            assert await version(one) == "1"
            keys.write_bytes(b"".join(public))
            assert (await one.post("/versions/1/load")).status_code == 200
            assert await conditions(one) == {"1": ("ready", "")}

    asyncio.run(scenario())


def test_a_signature_that_arrives_is_found_by_polling(flat_models: Path, tmp_path: Path, brighter: Brighter) -> None:
    """The version was refused without it, and is served from then on."""
    ours, keys = Ed25519PrivateKey.generate(), tmp_path / "keys.pem"
    keys.write_bytes(ours.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    sign(flat_models / "mnist-2d" / "1", ours)

    async def scenario() -> None:
        async with client(flat_models, model_public_keys=str(keys), poll_s=0.05) as one:
            late = brighter(flat_models, "2")

            async def refused() -> bool:
                return "is not signed" in (await conditions(one)).get("2", ("", ""))[1]

            async def served() -> bool:
                return await version(one) == "2"

            await eventually(refused)
            assert await version(one) == "1"
            sign(late, ours)
            await eventually(served)

    asyncio.run(scenario())


def test_loads_at_the_same_time_open_a_version_once(flat_models: Path) -> None:
    """They wait for each other, and are all answered."""
    opened = []

    def opening(folder: Path, _tell: object) -> Model:
        opened.append(folder.name)
        return open_model(folder, "CPUExecutionProvider", 1, 8)

    repository = Repository({}, "mnist-2d", ModelFolder(flat_models, Selection(), opening))

    async def scenario() -> None:
        async with client(flat_models, repository) as one:
            paths = ["/load", "/versions/1/load", "/load", "/versions/1/load"]
            answers = await asyncio.gather(*(one.post(path) for path in paths))
            assert {answer.status_code for answer in answers} == {200}

    asyncio.run(scenario())
    assert opened == ["1"]


def test_models_are_controlled_only_where_it_is_allowed(flat_models: Path) -> None:
    """The problem names the setting; a name from the path never leads anywhere but to a version that is there."""

    async def scenario() -> None:
        async with client(flat_models, model_control=False) as one:
            for path in ("/load", "/unload", "/versions/1/load", "/versions/1/unload"):
                refused = await one.post(path)
                assert (refused.status_code, refused.json()["code"]) == (403, "control_off")
                assert "VAE_MODEL_CONTROL" in refused.json()["detail"]
            assert await version(one) == "1"
        async with client(flat_models) as one:
            for path in ("/versions/2/load", "/versions/%2e%2e/load", "/versions/2/unload"):
                assert (await one.post(path)).status_code == 404
            unknown = await one.post("http://x/v1/models/nobody/load")
            assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_model")

    asyncio.run(scenario())


@pytest.mark.parametrize("versions", ["all", "latest"])
def test_a_bad_model_beside_good_ones_is_named_and_the_rest_serve(
    flat_models: Path, brighter: Brighter, seal: Seal, versions: str
) -> None:
    """A version before a bad one, too; unless it is the default model that has none left."""
    spoil_golden(brighter(flat_models, "2"), seal)
    spoil_golden(brighter(flat_models, "1", "other"), seal)

    async def scenario() -> None:
        async with client(flat_models, versions=versions, default_model="mnist-2d") as one:
            assert await version(one) == "1"
            ready = await one.get("http://x/health/ready")
            assert ready.status_code == 200
            assert [line.split(":")[:2] for line in ready.json()["failed"]] == [["mnist-2d", "2"], ["other", "1"]]
            assert (await one.post("http://x/v1/models/other/sample")).json()["code"] == "not_ready"

    asyncio.run(scenario())


CONTROL_PATHS = ("/load", "/unload", "/versions/1/load", "/versions/1/unload")
KEYS = {"ops": "control", "alice": "infer"}


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}-0123456789abcdef"}


@pytest.fixture
def api_keys(tmp_path: Path) -> str:
    """A file with a key for each right."""
    path = tmp_path / "keys"
    path.write_text("".join(f"{name} {name}-0123456789abcdef {right}\n" for name, right in KEYS.items()))
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize("open_to_all", [False, True])
def test_control_needs_a_key(flat_models: Path, open_to_all: bool, caplog: pytest.LogCaptureFixture) -> None:
    """That an address is open to callers without keys does not open control; the refusal and the log name both ways."""

    async def scenario() -> None:
        async with client(flat_models, model_control=True, allow_anonymous=open_to_all) as one:
            for path in CONTROL_PATHS:
                refused = await one.post(path)
                assert (refused.status_code, refused.json()["code"]) == (403, "control_off")
                assert "VAE_API_KEYS" in refused.json()["detail"]
                assert "VAE_MODEL_CONTROL=anonymous" in refused.json()["detail"]
            assert await version(one) == "1"

    asyncio.run(scenario())
    assert [record.name for record in caplog.records if "VAE_MODEL_CONTROL" in record.message] == [
        "service.security.middleware"
    ]


@pytest.mark.parametrize("control", [True, "anonymous"])
def test_where_there_are_keys_control_needs_one_with_the_right(
    flat_models: Path, api_keys: str, control: bool | str
) -> None:
    """Also where callers without a key might control if there were no keys."""

    async def scenario() -> None:
        async with client(flat_models, model_control=control, api_keys=api_keys) as one:
            for path in CONTROL_PATHS:
                assert (await one.post(path)).status_code == 401
                assert (await one.post(path, headers=bearer("alice"))).status_code == 403
                assert (await one.post(path, headers=bearer("ops"))).status_code == 200

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "page",
    [
        {"origin": "http://evil.example", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"origin": "null", "content-type": "application/x-www-form-urlencoded"},
        {"origin": "http://evil.example", "host": "evil.example"},
        {"origin": "http://evil.example:8000", "host": "evil.example:8000", "sec-fetch-site": "same-origin"},
    ],
    ids=["fetch", "form", "rebinding", "rebinding of this port"],
)
def test_a_page_of_others_unloads_nothing(flat_models: Path, page: dict[str, str]) -> None:
    """On a machine whose service anybody may control."""

    async def scenario() -> None:
        async with client(flat_models) as one:
            for path in CONTROL_PATHS:
                refused = await one.post(path, headers=page)
                assert (refused.status_code, refused.json()["code"]) in ((403, "cross_site"), (421, "unknown_host"))
            assert await version(one) == "1"

    asyncio.run(scenario())


def test_every_order_is_in_the_audit_log(flat_models: Path, api_keys: str, caplog: pytest.LogCaptureFixture) -> None:
    """Who gave it, from where, about what, and what came of it; names that callers make up cannot forge a line."""
    caplog.set_level(logging.INFO, "service.audit")

    async def scenario() -> None:
        async with client(flat_models, api_keys=api_keys) as one:
            headers = {**bearer("ops"), "x-request-id": "r-1"}
            await one.post("/unload", headers=headers)
            await one.post("/versions/1/load", headers=headers)
            await one.post("/versions/9/load", headers=headers)
            await one.post("http://x/v1/models/a%0Ab/load", headers=headers)
            await one.post("/load", headers=bearer("alice"))
        async with client(flat_models, model_control=False) as one:
            await one.post("/load")

    asyncio.run(scenario())
    told = [record for record in caplog.records if record.name == "service.audit"]
    assert [
        (line.action, line.model, line.version, line.outcome, line.key)  # type: ignore[attr-defined]
        for line in told
    ] == [
        ("unload", "mnist-2d", "", "ok", "ops"),
        ("load", "mnist-2d", "1", "ok", "ops"),
        ("load", "mnist-2d", "9", "unknown_model", "ops"),
        ("load", "a\nb", "", "unknown_model", "ops"),
        ("load", "mnist-2d", "", "control_off", ""),
    ]
    assert told[0].getMessage() == (
        "unload model mnist-2d version (all): ok (by the API key ops at 127.0.0.1, request r-1)"
    )
    assert all("\n" not in line.getMessage() for line in told)
