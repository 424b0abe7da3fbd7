"""API keys: reading the file, and reading it again."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from service.errors import StartError
from service.security.keys import CHECK_INTERVAL_S, CONTROL, INFER, Keyring, read_keys

ALICE, OPS = "alice-0123456789abcdef", "ops-0123456789abcdef"


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """As time.monotonic()."""
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def written(path: Path, text: str) -> None:
    """Replace the file by a new one, as an orchestrator's secret changes."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o600)
    os.replace(new, path)  # noqa: PTH105


def test_a_line_is_a_key_with_its_rights_and_limits(path: Path) -> None:
    """The key itself or its digest; comments and empty lines are passed over."""
    digest = hashlib.sha256(OPS.encode()).hexdigest()
    path.write_text(
        f"# who\n\nalice {ALICE} infer rate=5/second,100/minute concurrency=4\nops sha256:{digest} infer,control\n"
    )
    alice, ops = read_keys(path)
    assert (alice.name, alice.rights, alice.limits.concurrency) == ("alice", {INFER}, 4)
    assert [(rate.amount, rate.get_expiry()) for rate in alice.limits.rates] == [(5, 1), (100, 60)]
    assert (ops.name, ops.rights, ops.limits.rates, ops.limits.concurrency) == ("ops", {INFER, CONTROL}, (), 0)
    keys = Keyring(path)
    assert keys.find(ALICE.encode()) == alice
    assert keys.find(OPS.encode()) == ops
    assert keys.find(digest.encode()) is None
    assert keys.find(b"") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no API key"),
        ("alice\n", "line 1: name, key or rights are missing"),
        ("\nalice short infer\n", "line 2: a key has at least 16 characters"),
        (f"alice {ALICE} everything\n", "unknown right everything; there are infer, control"),
        (f"al/ice {ALICE} infer\n", "a name has letters"),
        ("alice sha256:0123 infer\n", "64 hexadecimal digits"),
        (f"alice {ALICE} infer rate=often\n", "rate limit"),
        (f"alice {ALICE} infer concurrency=-1\n", "concurrency is a whole number"),
        (f"alice {ALICE} infer 100/minute\n", "limits are rate= and concurrency="),
        (f"alice {ALICE} infer\nalice {OPS} infer\n", "line 2: the name or the key occurs twice"),
        (f"alice {ALICE} infer\nbob {ALICE} infer\n", "line 2: the name or the key occurs twice"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_named(path: Path, text: str, says: str) -> None:
    """The message has the line, never the key."""
    path.write_text(text)
    with pytest.raises(StartError) as caught:
        read_keys(path)
    assert says in str(caught.value)
    assert ALICE not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_file_is_read_again(path: Path) -> None:
    """The file is checked at most once a second; a removed key stops working."""
    clock = Clock()
    path.write_text(f"alice {ALICE} infer\n")
    keys = Keyring(path, clock)
    written(path, f"ops {OPS} infer\n")
    assert keys.find(ALICE.encode())
    clock.now += CHECK_INTERVAL_S
    assert keys.find(ALICE.encode()) is None
    assert keys.find(OPS.encode())


@pytest.mark.parametrize("text", ["nonsense", None])
def test_a_broken_file_changes_nothing(path: Path, text: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """The old keys stay, the log has the reason once, and a repaired file counts again."""
    clock = Clock()
    written(path, f"alice {ALICE} infer\n")
    keys = Keyring(path, clock)
    path.unlink() if text is None else written(path, text)
    for _ in range(3):
        clock.now += CHECK_INTERVAL_S
        assert keys.find(ALICE.encode())
    (record,) = caplog.records
    assert "stay as they were" in record.message
    assert str(path) in record.message
    written(path, f"ops {OPS} infer\n")
    clock.now += CHECK_INTERVAL_S
    assert keys.find(OPS.encode())


@pytest.mark.parametrize("text", ["", "\n \n", "# nobody any more\n"])
def test_a_file_that_stays_empty_revokes_every_key(path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """The second check revokes, because a file is empty while it is written; new keys count at once."""
    clock = Clock()
    written(path, f"alice {ALICE} infer\n")
    keys = Keyring(path, clock)
    written(path, text)
    clock.now += CHECK_INTERVAL_S
    assert keys.find(ALICE.encode())
    clock.now += CHECK_INTERVAL_S
    assert keys.find(ALICE.encode()) is None
    clock.now += CHECK_INTERVAL_S
    assert keys.find(ALICE.encode()) is None
    (record,) = caplog.records
    assert "no API key is valid any more" in record.message
    written(path, f"ops {OPS} infer\n")
    clock.now += CHECK_INTERVAL_S
    assert keys.find(OPS.encode())


@pytest.mark.parametrize("between", [f"alice {ALICE} infer\n", "half a li", None])
def test_a_file_that_is_empty_now_and_then_revokes_nothing(path: Path, between: str | None) -> None:
    """Only two empty checks in a row revoke keys."""
    clock = Clock()
    written(path, f"alice {ALICE} infer\n")
    keys = Keyring(path, clock)
    for text in ("", between, "", between):
        path.unlink() if text is None else written(path, text)
        clock.now += CHECK_INTERVAL_S
        assert keys.find(ALICE.encode())


def test_a_worker_that_starts_after_all_keys_were_revoked_lets_nobody_in(path: Path) -> None:
    """A worker that starts with an empty file refuses every key, and accepts later ones."""
    clock = Clock()
    written(path, "")
    keys = Keyring(path, clock)
    assert keys.find(ALICE.encode()) is None
    written(path, f"ops {OPS} infer\n")
    clock.now += CHECK_INTERVAL_S
    assert keys.find(OPS.encode())


def test_keys_are_revoked_also_where_nobody_calls(path: Path) -> None:
    """The first call after a pause uses the file's current content."""
    written(path, f"alice {ALICE} infer\n")
    clock = Clock()  # which stands still: no call looks at the file
    keys = Keyring(path, clock)
    written(path, "")

    async def wait() -> None:
        watch = asyncio.create_task(keys.watch())
        async with asyncio.timeout(30):
            while keys.find(ALICE.encode()):  # noqa: ASYNC110  # what is waited for is a look at a file
                await asyncio.sleep(0.05)
        watch.cancel()

    asyncio.run(wait())


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644])
def test_a_file_that_others_can_read_is_warned_of(path: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    """The log warns once at the start and once when it happens, also through a link; the keys count."""
    clock = Clock()
    target = path.with_suffix(".target")
    written(target, f"alice {ALICE} infer\n")
    path.symlink_to(target)
    target.chmod(mode)
    keys = Keyring(path, clock)
    assert [str(path) in record.message for record in caplog.records] == [True]
    for changed, warned in ((0o640, 1), (0o400, 1), (mode, 2), (mode, 2)):
        target.chmod(changed)
        clock.now += CHECK_INTERVAL_S
        assert keys.find(ALICE.encode())
        assert len(caplog.records) == warned
