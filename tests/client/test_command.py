"""The command line `vae`, as its users run it: in a process of its own."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.client.conftest import DIGIT, NOISY, ROOT, SHIPPED, Counted, answer, answering, drop, environment, vae
from tests.service.test_security import Certificate
from vae_client import Client, command, compare, errors, local
from vae_client.operations import NAMES, options_of

MASK, SMALL = ROOT / "examples" / "mask.png", ROOT / "examples" / "small.png"


def form_of(path: Path) -> tuple[str | None, tuple[int, int]]:
    """Format and size of a picture file."""
    with Image.open(path) as file:
        return file.format, file.size


def test_a_file_is_denoised(address: str, client: Client, tmp_path: Path) -> None:
    """The file holds what the service answers; standard output stays empty, the error stream names the model."""
    done = vae("denoise", NOISY, "-o", "clean.png", url=address, cwd=tmp_path)
    assert (done.status, done.out) == (0, "")
    assert "mnist version" in done.err
    assert (tmp_path / "clean.png").read_bytes() == client.denoise(NOISY, accept="png").content


@pytest.mark.usefixtures("folder")
def test_the_commands_of_the_documentation(address: str, tmp_path: Path) -> None:
    """A TIFF stays a TIFF, a sheet of samples, latents of a folder in Parquet."""
    with Image.open(NOISY) as picture:
        picture.save(tmp_path / "scan.tif")
    assert vae("denoise", "scan.tif", "-o", "clean.tif", url=address, cwd=tmp_path).status == 0
    assert vae("sample", "-n", "64", "--seed", "7", "-o", "sheet.png", url=address, cwd=tmp_path).status == 0
    assert vae("encode", "pictures/", "-o", "latents.parquet", url=address, cwd=tmp_path).status == 0
    assert form_of(tmp_path / "clean.tif")[0] == "TIFF"
    assert form_of(tmp_path / "sheet.png") == ("PNG", (8 * 28, 8 * 28))
    assert parquet.read_table(tmp_path / "latents.parquet").num_rows == 10


@pytest.mark.parametrize(
    "words",
    [
        ["reconstruct", DIGIT, "-o", "x.png"],
        ["inpaint", DIGIT, "--mask", MASK, "--draws", "4", "--seed", "3", "-o", "x.png"],
        ["super-resolve", SMALL, "--factor", "2", "-o", "x.png"],
        ["denoise", NOISY, "--uncertainty", "map", "-o", "x.png"],
        ["denoise", NOISY, "--noise", "gaussian", "--level", "0.25", "-o", "x.png"],
        ["interpolate", DIGIT, NOISY, "--path", "linear", "-o", "x.gif"],
        ["traverse", "--model", "mnist-2d:1", "--size", "5", "-o", "x.png"],
        ["denoise", NOISY, "--uncertainty", "-o", "x.npz"],
        ["sample", "--temperature", "0.5", "-o", "x.npy"],
    ],
    ids=lambda words: words[0],
)
def test_every_operation_has_a_command(words: list[str], address: str, tmp_path: Path) -> None:
    """It writes a file of the kind that its name has."""
    assert vae(*words, url=address, cwd=tmp_path).status == 0
    (path,) = tmp_path.iterdir()
    if path.suffix in (".png", ".gif"):
        assert form_of(path)[0] == path.suffix[1:].upper()
    else:
        assert np.load(path) is not None


def test_latents_go_round(address: str, client: Client, tmp_path: Path) -> None:
    """Encoded into a file and decoded from it, with the fingerprint, which another model refuses."""
    assert vae("encode", DIGIT, "-o", "z.npz", url=address, cwd=tmp_path).status == 0
    assert vae("decode", "z.npz", "-o", "back.png", url=address, cwd=tmp_path).status == 0
    assert (tmp_path / "back.png").read_bytes() == client.reconstruct(DIGIT, accept="png").content
    refused = vae("decode", "z.npz", "-o", "no.png", "--model", "mnist-2d", url=address, cwd=tmp_path)
    assert (refused.status, "(wrong_model)" in refused.err) == (command.REFUSED, True)
    assert not (tmp_path / "no.png").exists()
    assert vae("encode", DIGIT, "-o", "z2.npz", "--model", "mnist-2d", url=address, cwd=tmp_path).status == 0
    assert "mnist-2d version" in vae("decode", "z2.npz", "-o", "back2.png", url=address, cwd=tmp_path).err


def test_scores_are_printed(address: str, client: Client) -> None:
    """A line an image, or JSON with every digit."""
    lines = vae("score", DIGIT, NOISY, "--seed", "3", url=address).out.splitlines()
    assert lines[0].split()[:2] == ["file", "elbo"]
    assert [line.split()[0] for line in lines[1:]] == [str(DIGIT), str(NOISY)]
    told = json.loads(vae("score", DIGIT, "--seed", "3", "--json", url=address).out)
    assert told["seed"] == 3
    np.testing.assert_allclose(told["elbo"], client.score(DIGIT, seed=3).elbo, rtol=1e-6)


def test_pipes_carry_pictures(address: str, client: Client) -> None:
    """A dash is standard input, and a PNG on standard output."""
    done = vae("denoise", "-", "-o", "-", url=address, given=NOISY.read_bytes())
    assert done.raw == client.denoise(NOISY, accept="png").content
    assert done.status == 0


def test_models_are_listed(address: str, client: Client) -> None:
    """In a table, in full, and as a card."""
    lines = vae("models", url=address).out.splitlines()
    assert {line.split()[0] for line in lines} == SHIPPED | {"model"}
    assert (
        json.loads(vae("models", "mnist-2d:1", url=address).out)["fingerprint"]
        == client.model("mnist-2d")["fingerprint"]
    )
    assert vae("models", "mnist", "--card", url=address).out.startswith("# mnist")
    assert len(json.loads(vae("models", "--json", url=address).out)) == len(SHIPPED)
    (photo,) = [line for line in lines if line.startswith("photo ")]
    assert "1 or 3 x height x width" in photo


def test_many_files_are_reported(address: str, folder: Path, tmp_path: Path) -> None:
    """Those that failed at the end, with an exit status of their own; the next run does the rest."""
    good = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(b"no picture")
    done = vae("denoise", folder, "-o", "clean", url=address, cwd=tmp_path)
    assert done.status == command.SOME_FAILED
    assert done.err.splitlines()[0] == "clean: 9 done"
    assert "2.png: " in done.err.splitlines()[1]
    (folder / "2.png").write_bytes(good)
    again = vae("denoise", folder, "-o", "clean", "--json", url=address, cwd=tmp_path)
    told = json.loads(again.out)
    assert (again.status, told["done"], told["before"], told["failed"]) == (0, 1, 9, [])
    some = vae("denoise", folder / "0.png", folder / "1.png", "-o", "some", url=address, cwd=tmp_path)
    assert (some.status, sorted(path.name for path in (tmp_path / "some").glob("*.png"))) == (0, ["0.png", "1.png"])


def test_a_progress_bar_is_shown_on_a_terminal_alone(address: str, folder: Path, tmp_path: Path) -> None:
    """Elsewhere it would fill logs."""
    assert "%|" not in vae("denoise", folder, "-o", tmp_path / "a", url=address).err
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    words = [sys.executable, "-m", "vae_client", "denoise", str(folder), "-o", str(tmp_path / "b"), "--url", address]
    process = subprocess.Popen(words, env=environment(), stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += (part := os.read(leader, 4096))
        except OSError:  # the terminal's end
            break
        if not part:
            break
    os.close(leader)
    assert process.wait(60) == 0
    assert b"10/10" in shown


def test_ctrl_c_ends_cleanly(counted: tuple[Counted, str], folder: Path, tmp_path: Path) -> None:
    """With 130 and one line; the same command goes on."""
    app, url = counted
    app.forget(pause_s=0.3)
    words = [sys.executable, "-m", "vae_client", "denoise", str(folder), "-o", str(tmp_path / "out"), "--url", url]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    while not [*(tmp_path / "out").glob("*.png")]:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert (process.returncode, said) == (command.INTERRUPTED, "vae: interrupted\n")
    assert [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []
    assert vae("denoise", folder, "-o", tmp_path / "out", url=url).status == 0


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["models"], command.USAGE, r"--url.*VAE_CLIENT_URL.*--local"),
        (["models", "--url", "localhost:8000"], command.USAGE, "write http://localhost:8000"),
        (["models", "--url", "http://127.0.0.1:1"], command.UNAVAILABLE, r"127\.0\.0\.1:1.*refused"),
        (["models", "--url", "http://x", "--local"], command.USAGE, "leave one of them out"),
        (["models", "--url", "http://x", "--models", "y"], command.USAGE, "add --local"),
        (["models", "--local", "--models", "/nowhere"], command.REFUSED, "no model repository /nowhere"),
        (["sharpen", "x"], command.USAGE, "invalid choice"),
        (["denoise", NOISY], command.USAGE, "--out"),
        (["denoise", NOISY, "-o", "x.png", "--noise", "loud"], command.USAGE, "gaussian"),
        (["denoise", NOISY, "-o", "x.png", "--level", "much"], command.USAGE, "'much' is no number"),
        (["compare", DIGIT, ROOT / "examples" / "astronaut.png"], command.USAGE, "differ in size"),
        (["compare", DIGIT, "nowhere.png"], command.REFUSED, "nowhere.png: No such file"),
        (["compare", DIGIT, ROOT / "README.md"], command.REFUSED, "README.md is no picture"),
        (["denoise", NOISY, "-o", "no/where/x.png", "--url", "http://127.0.0.1:1"], command.USAGE, "no/where.*create"),
        (["denoise", "nowhere/", "-o", "x", "--url", "http://127.0.0.1:1"], command.REFUSED, "nowhere: No such file"),
        (["denoise", NOISY, "-", "-o", "x", "--url", "http://127.0.0.1:1"], command.USAGE, "one picture; leave - out"),
        (["models", "--url", "http://127.0.0.1:1", "--timeout", "inf"], command.USAGE, "at most 999999999"),
        (["models", "--url", "http://127.0.0.1:1", "--timeout", "1e9"], command.USAGE, "at most 999999999"),
    ],
)
def test_an_error_is_one_line_that_names_the_fix(words: list[str], status: int, says: str) -> None:
    """With an exit status by its kind, and nothing on standard output."""
    done = vae(*words)
    assert (done.status, done.out) == (status, "")
    assert done.err.count("\n") == 1
    assert re.search(says, done.err), done.err


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["denoise", "nowhere.png", "-o", "x.png"], command.REFUSED, "nowhere.png: No such file"),
        (["denoise", NOISY, "-o", "x.bmp"], command.USAGE, r"\.png, \.tif"),
        (["denoise", NOISY, "-o", "x.png", "--level", "7"], command.REFUSED, "level.*invalid_option"),
        (["denoise", NOISY, "-o", "x.png", "--uncertainty"], command.REFUSED, "not_acceptable"),
        (["denoise", NOISY, "-o", "x.png", "--timeout", "0.001"], command.TIMED_OUT, "the option is --timeout"),
        (["sample", "--model", "nobody", "-o", "x.png"], command.REFUSED, "unknown_model"),
        (["decode", NOISY, "-o", "x.png"], command.USAGE, "holds no latents"),
        (["score", ROOT / "examples"], command.USAGE, "--out"),
        (["models", "--card"], command.USAGE, "name it"),
    ],
)
def test_a_refusal_is_one_line_too(words: list[str], status: int, says: str, address: str, tmp_path: Path) -> None:
    """No file is left; with --json the error is JSON."""
    done = vae(*words, url=address, cwd=tmp_path)
    assert (done.status, done.out) == (status, "")
    assert done.err.count("\n") == 1
    assert re.search(says, done.err), done.err
    told = json.loads(vae(*words, "--json", url=address, cwd=tmp_path).err)
    assert re.search(says.partition(".*")[0], told["error"]["detail"] + told["error"].get("code", ""))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["empty.npy", "text.npy", "cut.npy", "huge.npy", "text.npz", "cut.npz", "cut.png", "empty.png"]
)
def test_a_broken_file_is_named(name: str, tmp_path: Path) -> None:
    """Not as a traceback, and not as a picture of no name; no service need be there."""
    content = io.BytesIO()
    np.savez(content, mean=np.ones((1, 40), np.float32), fingerprint=np.array("x"))
    array = io.BytesIO()
    np.save(array, np.ones((1, 40), np.float32))
    broken = {
        "text": b"text",
        "empty": b"",
        "cut.npy": array.getvalue()[:-9],
        "huge": array.getvalue().replace(b"(1, 40)", b"(9999999999, 40)".ljust(7))[:128],
        "cut.npz": content.getvalue()[:200],
        "cut.png": NOISY.read_bytes()[:300],
    }
    (tmp_path / name).write_bytes(broken.get(name) or broken.get(name.partition(".")[0], b""))
    asked = [["compare", name, name]]
    if not name.endswith(".png"):
        asked.append(["decode", name, "-o", "x.png", "--url", "http://127.0.0.1:1"])
    for words in asked:
        done = vae(*words, cwd=tmp_path)
        assert (done.status, done.err.count("\n")) == (command.REFUSED, 1), done.err
        assert re.search(f"vae: {name} is (empty|no .npy|no picture|broken)", done.err), done.err


def test_endings_may_be_capitals(address: str, tmp_path: Path) -> None:
    """As cameras and old systems write them."""
    for name in ("a.NPZ", "a.NPY", "a.PNG"):
        done = vae("sample", "--seed", "1", "-o", name, url=address, cwd=tmp_path)
        assert done.status == 0, done.err
    assert vae("compare", "a.NPY", "a.PNG", cwd=tmp_path).status == 0


def test_latents_of_many_files_go_round(address: str, folder: Path, tmp_path: Path) -> None:
    """What `encode` wrote of a folder is what `decode` reads, and the model is the one that encoded."""
    assert vae("encode", folder, "-o", "latents", url=address, cwd=tmp_path).status == 0
    done = vae("decode", "latents", "-o", "back", url=address, cwd=tmp_path)
    assert (done.status, len([*(tmp_path / "back").rglob("*.npz")])) == (0, 10), done.err
    assert vae("decode", "latents/0.npz", "latents/1.npz", "-o", "two", url=address, cwd=tmp_path).status == 0
    other = vae("decode", "latents", "-o", "other", "--model", "mnist-2d", url=address, cwd=tmp_path)
    assert other.status != 0
    assert "fingerprint" in other.err


def test_an_overloaded_service_has_its_status() -> None:
    """So that a script can try again later."""
    refused = answer(503, b"{}", "application/problem+json", retry_after="1000")
    with answering([refused]) as server:
        assert vae("models", url=server.url).status == command.UNAVAILABLE
    with answering([drop]) as server:
        assert vae("models", "--timeout", "2", url=server.url).status == command.UNAVAILABLE


def test_the_key_comes_from_the_environment() -> None:
    """It is sent as a bearer token, and never taken from the command line, which others can read."""
    with answering([answer(200, b'{"models": []}')]) as server:
        vae("models", url=server.url, VAE_CLIENT_KEY="secret")
        assert server.seen[0][2]["authorization"] == "Bearer secret"
        vae("models", url=server.url, VAE_CLIENT_KEY="schlüssel")
        assert server.seen[1][2]["authorization"].encode("latin-1") == "Bearer schlüssel".encode()
    done = vae("models", "--url", "http://127.0.0.1:1", VAE_CLIENT_KEY="two\nlines")
    assert (done.status, done.err.count("\n")) == (command.USAGE, 1), done.err
    assert "--key" not in vae("models", "--help").out
    problem = b'{"status": 401, "code": "unauthenticated", "detail": "an API key is needed"}'
    with answering([answer(401, problem, "application/problem+json")]) as server:
        assert "VAE_CLIENT_KEY" in vae("models", url=server.url).err


def test_a_certificate_of_ones_own_is_named_by_the_error(tmp_path: Path) -> None:
    """At once, with the variable that trusts it; with that variable the command works."""
    certificate = Certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.path, certificate.key)
    with answering([answer(200, b'{"models": []}')], context) as server:
        done = vae("models", url=server.url)
        assert done.status == command.UNAVAILABLE
        assert "SSL_CERT_FILE" in done.err
        assert server.seen == []
        assert vae("models", url=server.url, SSL_CERT_FILE=str(certificate.path)).status == 0


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says of itself, in one line."""
    with pytest.raises(SystemExit) as done:
        command.main([*words, "--help"])
    assert done.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_every_option_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """With what the documentation of its method says; exit statuses are in that of all commands."""
    for operation in NAMES:
        told = help_of(capsys, operation)
        for name in options_of(operation).keys() - set(command.OF_STREAMS):
            assert f"--{name.replace('_', '-')}" in told
    told = help_of(capsys)
    assert "exit codes:" in told
    assert all(f" {name} " in told for name in NAMES)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_shells_complete_commands(shell: str, tmp_path: Path) -> None:
    """The script names every command; bash reads it and completes a word."""
    script = vae("--print-completion", shell).out
    assert all(name in script for name in NAMES)
    if shell == "bash":
        (tmp_path / "vae").write_text(script)
        ask = 'source vae; COMP_WORDS=(vae den); COMP_CWORD=1; _shtab_vae vae den vae; echo "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["denoise"]


@pytest.fixture
def own_models(tmp_path: Path) -> Path:
    """A model repository of a test's own, with the shipped `mnist`."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mnist").symlink_to(ROOT / "models" / "mnist")
    return tmp_path / "models"


def services_of(models: Path) -> list[int]:
    """Services of a model repository that run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if f"--models={models}".encode() in words:
                found.append(int(folder.name))
    return found


def test_a_service_is_started_for_one_command(own_models: Path, tmp_path: Path) -> None:
    """On a free port of loopback, with the models that are named, whatever the environment says; it ends then."""
    words = ["denoise", NOISY, "-o", "clean.png", "--local", "--models", own_models]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = vae(
            *words, url="http://127.0.0.1:1", cwd=tmp_path, VAE_PORT=port, VAE_API_KEYS="/nowhere", VAE_THREADS="1"
        )
    assert done.status == 0, done.err
    assert form_of(tmp_path / "clean.png") == ("PNG", (28, 28))
    assert services_of(own_models) == []


def test_a_killed_command_leaves_no_service(own_models: Path) -> None:
    """The kernel ends it."""
    script = (
        "import sys, time\nfrom vae_client import local\n"
        "with local.started(sys.argv[1]) as url:\n    print(url, flush=True)\n    time.sleep(60)"
    )
    words = [sys.executable, "-c", script, str(own_models)]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"http://127.0.0.1:")
    assert services_of(own_models)
    process.kill()
    process.communicate()
    end = time.monotonic() + 20
    while services_of(own_models) and time.monotonic() < end:
        time.sleep(0.05)
    assert services_of(own_models) == []


def test_models_of_an_editable_service_are_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than guessed; and a service that is not installed is named with the command that installs it."""
    with pytest.raises(errors.StartFailed, match="name --models"):  # this project's, as `make setup` installs it
        local.included_models()
    monkeypatch.setattr(local, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(errors.StartFailed, match=r"pip install \. \./client"):
        local.included_models()


@pytest.mark.parametrize("shape", [(40, 30), (3, 33, 21)])
def test_psnr_and_ssim_are_those_of_the_literature(shape: tuple[int, ...]) -> None:
    """As scikit-image computes them with the settings of the paper."""
    draw = np.random.default_rng(1)
    one = draw.random(shape)
    other = np.clip(one + 0.1 * draw.standard_normal(shape), 0, 1)
    found = compare(one, other)
    axis = 0 if len(shape) == 3 else None
    expected = structural_similarity(
        one, other, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=axis
    )
    assert found.psnr_db == pytest.approx(peak_signal_noise_ratio(one, other, data_range=1.0))
    assert found.ssim == pytest.approx(expected, abs=1e-6)
    assert compare(one, one) == (float("inf"), pytest.approx(1.0))


def test_files_are_compared_without_a_service(tmp_path: Path) -> None:
    """Their bits count, and formats do not; what Pillow would cut to 8 bits is refused."""
    levels = np.random.default_rng(2).integers(0, 65536, (20, 20)).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "a.tif")
    np.save(tmp_path / "b.npy", (levels.astype(np.float64) / 65535).astype(np.float32))
    assert compare(tmp_path / "a.png", tmp_path / "a.tif").psnr_db == float("inf")
    assert compare(tmp_path / "a.png", tmp_path / "b.npy").psnr_db > 100
    done = vae("compare", tmp_path / "a.png", tmp_path / "b.npy", "--json")
    assert json.loads(done.out)["ssim"] == pytest.approx(1.0)
    assert vae("compare", NOISY, DIGIT).out.splitlines()[1].startswith("SSIM 0.")
    deep = bytearray(io.BytesIO((tmp_path / "a.png").read_bytes()).getvalue())
    deep[25] = 2  # colour of 16 bits
    (tmp_path / "deep.png").write_bytes(deep)
    with pytest.raises(errors.InvalidRequest, match="16 bits"):
        compare(tmp_path / "deep.png", tmp_path / "b.npy")
