"""Which versions are served: by the setting, and by overrides on top of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.errors import StartError
from service.repository.overrides import WHOLE, Overrides, Report, SharedState
from service.repository.repository import Repository
from service.repository.selection import Selection
from service.settings import read_settings

FOUND = {"1", "2", "10"}


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", {"1", "2", "10"}),
        ("latest", {"10"}),
        ("m:2", {"2"}),
        ("m:1,m:latest,n:5", {"1", "10"}),
        ("m:7", {"7"}),
        ("m:all", {"1", "2", "10"}),
        ("n:1", set()),
    ],
)
def test_the_setting_chooses_versions(text: str, chosen: set[str]) -> None:
    """All, the latest, or those of a list."""
    assert Selection(text).chosen("m", FOUND) == chosen


def test_the_latest_of_no_version_is_none() -> None:
    """A folder that was emptied."""
    assert Selection("latest").chosen("m", set()) == set()


@pytest.mark.parametrize("text", ["", "newest", "m:", ":1", "m:1,", "m:1,all"])
def test_what_is_no_selection_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """With what may be said instead."""
    monkeypatch.setenv("VAE_VERSIONS", text)
    with pytest.raises(StartError, match=r"^VAE_VERSIONS.*all, latest, or model:version"):
        read_settings()


def test_a_list_opens_what_it_names_and_a_model_that_is_not_there_is_refused(flat_models: Path) -> None:
    """A misspelt model ends the start; other models are not opened."""
    (flat_models / "broken" / "1").mkdir(parents=True)
    chosen = Repository.open(flat_models, "", "CPUExecutionProvider", 1, 8, Selection("mnist-2d:1"))
    assert list(chosen.models) == ["mnist-2d"]
    assert chosen.conditions["broken"]["1"][:3] == ("unloaded", "VAE_VERSIONS is mnist-2d:1", ())
    with pytest.raises(StartError, match="VAE_VERSIONS names mnits"):
        Repository.open(flat_models, "", "CPUExecutionProvider", 1, 8, Selection("mnits:1"))
    with pytest.raises(StartError, match="VAE_DEFAULT_MODEL names 'broken', but the models are mnist-2d"):
        Repository.open(flat_models, "broken", "CPUExecutionProvider", 1, 8, Selection("mnist-2d:1"))
    with pytest.raises(StartError, match="mnist-2d/5"):
        Repository.open(flat_models, "", "CPUExecutionProvider", 1, 8, Selection("mnist-2d:5"))


def test_overrides_come_before_the_setting() -> None:
    """One about a model takes the place of those about its versions; what failed or was unloaded does not count."""
    latest, none = Selection("latest"), Overrides()
    assert none.wanted(latest, "m", FOUND, set()) == {"10"}
    assert none.wanted(latest, "m", FOUND, {"10"}) == {"2"}
    with_old = none.after("m", "1", loaded=True)
    assert with_old.wanted(latest, "m", FOUND, set()) == {"1", "10"}
    assert with_old.wanted(latest, "n", FOUND, set()) == {"10"}
    back = with_old.after("m", "10", loaded=False)
    assert back.wanted(latest, "m", FOUND, set()) == {"1", "2"}
    assert back.is_unloaded("m", "10")
    gone = back.after("m", WHOLE, loaded=False)
    assert gone.wanted(latest, "m", FOUND, set()) == set()
    assert gone.after("m", "2", loaded=True).wanted(latest, "m", FOUND, set()) == {"2"}
    assert gone.after("m", WHOLE, loaded=True).wanted(latest, "m", FOUND, set()) == {"10"}


def test_later_requests_are_found_by_their_number() -> None:
    """With the versions to load again; an unloaded one is none."""
    overrides = Overrides().after("m", "1", loaded=True).after("n", "2", loaded=False).after("m", "3", loaded=True)
    assert overrides.since(0) == {"m": {"1", "3"}, "n": set()}
    assert overrides.since(2) == {"m": {"3"}}
    assert overrides.since(3) == {}


def test_overrides_of_several_workers_are_numbered_one_by_one(tmp_path: Path) -> None:
    """None is lost where several are added at once; a worker that is started later finds them all."""
    with ThreadPoolExecutor(4) as workers:
        numbers = list(workers.map(lambda k: SharedState(tmp_path).add("m", str(k), loaded=k % 2 == 0), range(40)))
    assert sorted(numbers) == list(range(1, 41))
    overrides = SharedState(tmp_path).overrides()
    assert overrides.number == 40
    assert {version: one.loaded for version, one in overrides.models["m"].items()} == {
        str(k): k % 2 == 0 for k in range(40)
    }


def test_the_reports_of_the_dead_are_not_read(tmp_path: Path) -> None:
    """Only workers that are alive count."""
    (tmp_path / "worker-999999999.json").write_text("{}")
    shared = SharedState(tmp_path)
    shared.report(Report(3, {"m": {"1": ("ready", "")}}))
    assert [report.applied for report in shared.reports()] == [3]
