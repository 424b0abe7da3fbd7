"""Settings: a misspelt name is an error, and values are checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.contract.cores import cpu_count
from service.errors import StartError
from service.runtime.session import execution_provider
from service.settings import Settings, read_settings


def test_the_environment_and_flags_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag comes before the variable; "false" is false."""
    monkeypatch.setenv("VAE_PORT", "9000")
    monkeypatch.setenv("VAE_ACCESS_LOG", "false")
    assert read_settings().port == 9000
    assert read_settings(["--port", "9001"]).port == 9001
    assert read_settings().access_log is False


def test_a_misspelt_setting_names_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """VAE_PROT is an error that suggests VAE_PORT."""
    monkeypatch.setenv("VAE_PROT", "9000")
    with pytest.raises(StartError, match="did you mean VAE_PORT"):
        read_settings()


@pytest.mark.parametrize(
    ("name", "value"), [("VAE_PORT", "99999"), ("VAE_EXECUTION_PROVIDER", "tpu"), ("VAE_MAX_ROWS", "0")]
)
def test_a_value_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """One line with the variable's name."""
    monkeypatch.setenv(name, value)
    with pytest.raises(StartError) as caught:
        read_settings()
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


def test_cuda_where_there_is_none_is_an_error() -> None:
    """Asking for it by name never falls back in silence; `auto` does."""
    assert execution_provider("auto") == "CPUExecutionProvider"
    with pytest.raises(StartError, match="install the `gpu` extra"):
        execution_provider("cuda")


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_threads_come_from_the_containers_quota(tmp_path: Path, files: dict[str, str], quota: int) -> None:
    """cgroup v2 and v1; part of a core counts as one."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_count(tmp_path) == min(quota, cpu_count(tmp_path / "none"))


def test_no_quota_is_the_hosts_cpus(tmp_path: Path) -> None:
    """`max`, -1 and no file at all."""
    (tmp_path / "cpu.max").write_text("max 100000")
    assert cpu_count(tmp_path) == cpu_count(tmp_path / "none") >= 1


def test_the_variables_of_the_client_are_none_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both may be set in one shell; no setting of the service has such a name."""
    monkeypatch.setenv("VAE_CLIENT_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("VAE_CLIENT_KEY", "secret")
    assert read_settings().port == 8000
    assert not any(name.startswith("client_") for name in Settings.model_fields)
