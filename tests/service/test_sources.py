"""Models from elsewhere, out of a real S3 server: what arrives is whole and checked, or there is one line."""

from __future__ import annotations

import http.server
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
from moto.server import ThreadedMotoServer

from service.contract.manifest import digest
from service.errors import StartError
from service.repository.remote import ATTEMPTS, local_copy, sync
from service.repository.repository import Repository
from service.settings import Settings
from training.evaluation.served import started

ROOT = Path(__file__).parents[2]
VERSION = ROOT / "models" / "mnist-2d" / "1"
REAL = "s3://models/real"
HURRIED = 0.01
Files = dict[str, bytes]


def tiny() -> Files:
    """A version of small files."""
    content, golden = json.loads((VERSION / "manifest.json").read_text()), (VERSION / "golden.npz").read_bytes()
    for graph in content["graphs"].values():
        graph["sha256"] = digest(golden)
    files = {graph["file"]: golden for graph in content["graphs"].values()}
    files |= {name: (VERSION / name).read_bytes() for name in ("README.md", "sheet.png")}
    return {**files, "golden.npz": golden, "manifest.json": json.dumps(content).encode()}


def other_decoder(file: str) -> Files:
    """A manifest that names another file."""
    return {"manifest.json": tiny()["manifest.json"].replace(b'"decoder.onnx"', f'"{file}"'.encode())}


class Bucket:
    """A prefix of the bucket `models`."""

    def __init__(self, endpoint: str, name: str) -> None:
        self.endpoint, self.url = endpoint, f"s3://models/{name}"
        self.options = at(endpoint)
        self.files = fsspec.filesystem("s3", use_listings_cache=False, **self.options)

    def put(self, version: str, files: Files) -> None:
        """Upload the files of a version."""
        self.files.pipe({f"{self.url}/{version}/{name}": content for name, content in files.items()})

    def remove(self, path: str) -> None:
        """Delete one file."""
        self.files.rm_file(f"{self.url}/{path}")


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The URL of an S3 server that holds a real version at REAL."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "somebody")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        server.start()
        real = Bucket("http://{}:{}".format(*server.get_host_and_port()), "real")
        real.files.mkdir("models")
        real.put("mnist-2d/1", {path.name: path.read_bytes() for path in VERSION.iterdir()})
        yield real.endpoint
        server.stop()


@pytest.fixture
def bucket(store: str, tmp_path: Path) -> Bucket:
    """A prefix of this test's own."""
    return Bucket(store, tmp_path.name)


def at(endpoint: str) -> dict[str, Any]:
    return {"endpoint_url": endpoint, "config_kwargs": {"retries": {"max_attempts": 1}}}


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {".lock"}


WHOLE = {f"mnist-2d/1/{path.name}" for path in VERSION.iterdir()}


class Cutter:
    """A TCP proxy that closes its first `cuts` connections after so many bytes of the answers, and counts bytes."""

    def __init__(self, upstream: str, cuts: int, after: int) -> None:
        self.upstream = httpx.URL(upstream)
        self.cuts, self.after, self.done, self.passed = cuts, after, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection((self.upstream.host, self.upstream.port or 80))
                threading.Thread(target=self._copy, args=(near, far, None), daemon=True).start()
                left = self.after if self.done < self.cuts else None
                threading.Thread(target=self._copy, args=(far, near, left), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, left: int | None) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if left is not None and len(data) > left:
                    self.done += 1
                    break
                left = None if left is None else left - len(data)
                self.passed += len(data) if target.getsockname()[1] == self.listener.getsockname()[1] else 0
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture
def cutter(store: str) -> Iterator[Any]:
    """A function that puts a proxy in front of the store."""
    proxies = []

    def make(cuts: int, after: int = 0) -> Cutter:
        proxies.append(Cutter(store, cuts, after))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.listener.close()


def test_a_repository_arrives_whole_and_only_once(cutter: Any, tmp_path: Path) -> None:
    """Every byte is as uploaded; asked again, only the manifest comes; a damaged file is fetched again, alone."""
    proxy = cutter(0)
    folder = sync(REAL, tmp_path / "copy", at(proxy.url))
    assert files_below(folder) == WHOLE
    for path in VERSION.iterdir():
        assert (folder / "mnist-2d" / "1" / path.name).read_bytes() == path.read_bytes()
    before = proxy.passed
    assert before > sum(path.stat().st_size for path in VERSION.iterdir())
    sync(REAL, folder, at(proxy.url))
    assert proxy.passed - before < 50_000
    damaged, before = folder / "mnist-2d" / "1" / "decoder.onnx", proxy.passed
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    sync(REAL, folder, at(proxy.url))
    assert damaged.read_bytes() == (VERSION / "decoder.onnx").read_bytes()
    assert proxy.passed - before < damaged.stat().st_size + 50_000


def test_what_the_repository_no_longer_has_is_removed(bucket: Bucket, tmp_path: Path) -> None:
    """A new version comes, an old one goes, a hidden one is nobody's."""
    bucket.put("mnist-2d/1", tiny())
    folder = sync(bucket.url, tmp_path, bucket.options)
    assert files_below(folder) == WHOLE
    (folder / "mnist-2d" / ".9").mkdir()
    bucket.remove("mnist-2d/1/manifest.json")
    bucket.put("mnist-2d/2", tiny())
    bucket.put("mnist-2d/.3", {"manifest.json": b"half"})
    sync(bucket.url, folder, bucket.options)
    assert files_below(folder) == {f"mnist-2d/2/{name}" for name in tiny()}
    assert [path.name for path in (folder / "mnist-2d").iterdir()] == ["2"]


def test_the_default_model_is_told_by_the_repository(bucket: Bucket, tmp_path: Path) -> None:
    """The file comes, changes and goes with what is uploaded."""
    bucket.put("mnist-2d/1", tiny())
    for line in (b"mnist-2d\n", b"other\n", None):
        if line:
            bucket.files.pipe(f"{bucket.url}/default", line)
        else:
            bucket.remove("default")
        folder = sync(bucket.url, tmp_path, bucket.options)
        assert files_below(folder) == WHOLE | ({"default"} if line else set())
        assert not line or (folder / "default").read_bytes() == line
    bucket.files.pipe(f"{bucket.url}/default", b"x" * 1025)
    with pytest.raises(StartError, match="default is larger than the 1024 bytes"):
        sync(bucket.url, tmp_path, bucket.options)


def test_cut_connections_are_made_good(cutter: Any, tmp_path: Path) -> None:
    """Three are cut in the middle of a file; what arrives is whole all the same."""
    proxy = cutter(3, 300_000)
    assert files_below(sync(REAL, tmp_path, at(proxy.url), HURRIED)) == WHOLE
    assert proxy.done == 3


def test_a_connection_that_is_always_cut_is_one_line(cutter: Any, tmp_path: Path) -> None:
    """After a bounded number of tries; nothing half-written is left."""
    proxy = cutter(1000, 300_000)
    with pytest.raises(StartError, match=r"^s3://models/real/mnist-2d/1/\w+\.\w+: .*see VAE_MODELS") as caught:
        sync(REAL, tmp_path, at(proxy.url), HURRIED)
    assert "\n" not in str(caught.value)
    assert proxy.done == ATTEMPTS
    assert not list(tmp_path.glob("mnist-2d/1"))
    assert not list(tmp_path.glob("mnist-2d/.1/.*"))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"decoder.onnx": b"x"}, "/mnist-2d/1/decoder.onnx does not match the SHA-256 in its manifest"),
        (other_decoder("other.onnx"), "/other.onnx is not there; upload the version again"),
        (other_decoder("../../decoder.onnx"), "manifest.json: graphs.decoder.file must be a plain file name"),
        ({"manifest.json": b"{"}, "manifest.json: not JSON"),
        ({"manifest.json": bytes(2**20 + 1)}, "manifest.json is larger than the 1048576 bytes that it may have"),
    ],
)
def test_what_is_wrong_with_a_version_is_one_line(bucket: Bucket, tmp_path: Path, files: Files, says: str) -> None:
    """It names the file and the fix, and the version is not there."""
    bucket.put("mnist-2d/1", {**tiny(), **files})
    with pytest.raises(StartError) as caught:
        sync(bucket.url, tmp_path / "copy", bucket.options, HURRIED)
    assert says in str(caught.value)
    assert str(caught.value).startswith(bucket.url)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("copy/*/1"))
    assert not list(tmp_path.glob("copy/*/.1/.*"))


def test_a_name_that_could_lead_elsewhere_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    """Models and versions are plain names."""
    bucket.put("MNIST 2\\d/1", tiny())
    with pytest.raises(StartError, match=r"/1/manifest.json: models and versions are named in lower case"):
        sync(bucket.url, tmp_path, bucket.options, HURRIED)
    assert files_below(tmp_path) == set()


def test_a_bad_new_version_leaves_the_good_one(bucket: Bucket, tmp_path: Path) -> None:
    """The copy of version 1 stays as it is."""
    bucket.put("mnist-2d/1", tiny())
    bucket.put("mnist-2d/2", {**tiny(), "encoder.onnx": b"x"})
    with pytest.raises(StartError, match=r"mnist-2d/2/encoder.onnx does not match"):
        sync(bucket.url, tmp_path, bucket.options, HURRIED)
    assert {path for path in files_below(tmp_path) if "/." not in path} == WHOLE


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://models/elsewhere", "s3://models/elsewhere holds no model; expected <name>/<version>/manifest.json"),
        ("s3://no-such-bucket/x", "s3://no-such-bucket/x"),
        ("nowhere://models", "nowhere://models: Protocol not known: nowhere; see VAE_MODELS"),
        ("gs://models", "need the extra: pip install '.[remote]'"),
        ("https://somebody:secret@models", "VAE_MODELS must hold no password"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line(store: str, tmp_path: Path, url: str, says: str) -> None:
    """With the fix, and without any secret."""
    with pytest.raises(StartError) as caught:
        sync(url, tmp_path, at(store) if url.startswith("s3") else {}, HURRIED)
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


SYNC = """
import json, pathlib, sys
from service.repository.remote import sync
sync(sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3]))
"""


def last_line_of(code: str, *arguments: str, file_bytes: int = -1) -> str:
    """What a process says last on standard error; no file of its may be larger."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=limit,
    )  # fmt: skip
    return done.stderr.strip().splitlines()[-1]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """The system refuses to write more than a megabyte; what was written of that file is removed."""
    said = last_line_of(SYNC, f"file://{VERSION.parents[1]}", str(tmp_path), "{}", file_bytes=2**20)
    assert said.startswith("service.errors.StartError: ")
    assert said.endswith("File too large; make room, or set VAE_CACHE to another folder")
    assert files_below(tmp_path) == {"mnist-2d/.1/manifest.json"}


def test_without_the_extra_its_name_is_told(tmp_path: Path) -> None:
    """In a process that has no fsspec."""
    said = last_line_of(f"import sys; sys.modules['fsspec'] = None\n{SYNC}", "s3://a/b", str(tmp_path), "{}")
    assert "pip install '.[remote]'" in said


def test_a_web_server_that_lists_its_folders_will_do(tmp_path: Path) -> None:
    """And so will one version's manifest.json where nothing is listed."""
    shutil.copytree(VERSION, tmp_path / "www" / "mnist-2d" / "1")
    handler = partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert files_below(sync(url, tmp_path / "all", {}, HURRIED)) == WHOLE
        assert files_below(sync(f"{url}/mnist-2d/1/manifest.json", tmp_path / "one", {}, HURRIED)) == WHOLE
        server.shutdown()


@pytest.mark.parametrize("file", ["manifest.json", "decoder.onnx", "golden.npz"])
def test_what_is_not_a_regular_file_is_not_fetched(tmp_path: Path, file: str) -> None:
    """A FIFO is not waited for, a link to a device is not read for ever."""
    version = tmp_path / "models" / "mnist-2d" / "1"
    shutil.copytree(VERSION, version)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (version / file).unlink()
        make(version / file)
        with pytest.raises(StartError, match=rf"{file} is not a regular file"):
            sync(f"file://{tmp_path}/models", tmp_path / "copy", {}, HURRIED)
        assert not list(tmp_path.glob("copy/*/1"))


@pytest.mark.parametrize("file", ["manifest.json", "decoder.onnx", "golden.npz"])
def test_a_file_larger_than_it_may_be_is_not_fetched(tmp_path: Path, file: str) -> None:
    """Sparse files of 8 GiB, of which nothing is copied."""
    version = tmp_path / "models" / "mnist-2d" / "1"
    shutil.copytree(VERSION, version)
    with (version / file).open("r+b") as opened:
        opened.truncate(2**33)
    with pytest.raises(StartError, match=rf"{file} is larger than the \d+ bytes that it may have"):
        sync(f"file://{tmp_path}/models", tmp_path / "copy", {}, HURRIED)
    assert not list(tmp_path.glob(f"copy/*/.1/*{file}"))


class Endless(http.server.BaseHTTPRequestHandler):
    """Says no sizes and sends for ever."""

    def do_GET(self) -> None:
        """Zeros, until the caller hangs up."""
        self.send_response(200)
        self.end_headers()
        with suppress(ConnectionError):
            while True:
                self.wfile.write(bytes(2**16))

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def test_a_web_server_that_sends_for_ever_is_cut_off(tmp_path: Path) -> None:
    """Where it has sent more than a manifest may have."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/mnist-2d/1/manifest.json"
        with pytest.raises(StartError, match=r"manifest.json is larger than the 1048576 bytes"):
            sync(url, tmp_path / "copy", {}, HURRIED)
        server.shutdown()


def test_what_is_not_a_regular_file_in_the_copy_is_fetched_again(tmp_path: Path) -> None:
    """Nothing in the local folder is waited for."""
    url = f"file://{VERSION.parents[1]}/mnist-2d/1/manifest.json"
    folder = sync(url, tmp_path / "copy", {}, HURRIED) / "mnist-2d" / "1"
    for file in ("manifest.json", "decoder.onnx"):
        (folder / file).unlink()
        os.mkfifo(folder / file)
    sync(url, tmp_path / "copy", {}, HURRIED)
    assert files_below(tmp_path / "copy") == WHOLE


class Quiet(http.server.SimpleHTTPRequestHandler):
    """As the library's, without its log."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def test_a_folder_is_served_where_it_is(tmp_path: Path) -> None:
    """And every URL has a copy of its own below VAE_CACHE."""
    assert local_copy(Settings(models=tmp_path)) == tmp_path
    first, second = (f"file://{path}" for path in (VERSION.parents[1], VERSION / "manifest.json"))
    copies = [local_copy(Settings(models=url, cache=str(tmp_path))) for url in (first, second)]
    assert copies[0] != copies[1]
    assert all(copy.parent == tmp_path for copy in copies)
    assert list(Repository.open(copies[1], "", "CPUExecutionProvider", 1, 8).models) == ["mnist-2d"]


def test_a_service_serves_models_from_the_store(store: str, tmp_path: Path) -> None:
    """From the start line to an answer; the copy is below VAE_CACHE."""
    settings = {"VAE_MODELS": REAL, "VAE_MODELS_OPTIONS": json.dumps(at(store)), "VAE_CACHE": str(tmp_path)}
    with started(**settings) as (_, url), httpx.Client(base_url=url, timeout=30) as client:
        assert client.get("/v1/models").json()["models"][0]["model"] == "mnist-2d"
        assert len(client.post("/v1/sample?count=2&seed=1").json()["images"]) == 2
    (copy,) = tmp_path.iterdir()
    assert files_below(copy) == WHOLE
