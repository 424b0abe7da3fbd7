"""The files of deploy/ and compose agree with the service, as far as their text shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.reference import PAGES, TABLES, with_lines, with_tables
from service.errors import ReaderFault, ServiceError
from service.observability.metrics import Telemetry
from service.security.hosts import Hosts
from service.settings import Settings, split

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())["services"]
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "vae.json").read_text())
MANIFEST = {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yml").read_text())}
POD = MANIFEST["Deployment"]["spec"]["template"]["spec"]
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
PANELS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = [rule["expr"] for rule in ALERTS] + PANELS


def exposed() -> set[str]:
    """Names of the series in /metrics."""
    families = Telemetry(lambda: (0, 0)).registry.collect()
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def codes(kind: type[ServiceError] = ServiceError) -> Iterator[str]:
    """Outcomes of a request besides ok."""
    yield kind.code
    for narrower in kind.__subclasses__():
        yield from codes(narrower)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_generated_tables_are_current(path: Path) -> None:
    """The tables in docs/ equal the code's, and links lead to the line: `python docs/reference.py` writes them."""
    page = path.read_text()
    assert with_lines(with_tables(page)) == page


def test_every_table_is_in_a_page() -> None:
    """Every table is in a page, and every key of a run's TOML has a description."""
    text = "".join(path.read_text() for path in PAGES)
    assert all(f"<!-- {name} -->" in text for name in TABLES)
    assert all(f"`VAE_{name.upper()}`" in text for name in Settings.model_fields)
    assert not re.findall(r"^\|.*\|  \|$", TABLES["keys"](), re.MULTILINE)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_queries_name_metrics_and_outcomes_that_exist(expression: str) -> None:
    """Queries of dashboard and alerts use existing metrics and outcomes."""
    assert set(re.findall(r"\bvae_\w+", expression)) <= exposed()
    outcomes = [code for found in re.findall(r'outcome=~?"([^"]+)"', expression) for code in found.split("|")]
    assert set(outcomes) <= {"ok", "internal_error", ReaderFault.outcome, *codes()}


def test_the_queue_that_fills_is_the_default_one() -> None:
    """The alert's limit is 0.8 of the setting's default."""
    rule = next(rule for rule in ALERTS if rule["alert"] == "VaeQueueFills")
    limit = float(re.findall(r"> (\d+)", rule["expr"])[0])
    assert limit == pytest.approx(0.8 * Settings.model_fields["queue_rows"].default, abs=1)


def test_the_dashboard_is_provisioned() -> None:
    """Its data source and folder are the provisioned ones, and no panels overlap."""
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert {target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel["targets"]} == {
        source["uid"] for source in sources
    }
    assert sources[0]["url"] == "http://prometheus:9090"
    folder = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/vae.yml").read_text())["providers"][0]["options"]
    assert folder["path"] in {volume["target"] for volume in COMPOSE["grafana"]["volumes"] if isinstance(volume, dict)}
    cells = [cell for panel in DASHBOARD["panels"] for cell in covered(**panel["gridPos"])]
    assert len(cells) == len(set(cells))


def covered(x: int, y: int, w: int, h: int) -> list[tuple[int, int]]:
    return [(column, row) for column in range(x, x + w) for row in range(y, y + h)]


@pytest.mark.parametrize("name", COMPOSE)
def test_every_container_is_confined(name: str) -> None:
    """Every container is confined, and none is published outside loopback."""
    service = COMPOSE[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    for volume in service.get("volumes", ()):
        assert not isinstance(volume, dict) or Path(DEPLOY.parent, volume["source"]).exists() or "$" in volume["source"]


def test_kubernetes_runs_it_as_compose_does() -> None:
    """Not root, a read-only root, no capability, limits; selectors match the pods."""
    (container,) = POD["containers"]
    assert POD["securityContext"]["runAsNonRoot"]
    assert POD["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert container["securityContext"] == confined
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    labels = MANIFEST["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [MANIFEST[kind]["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")]
    assert [*selectors, MANIFEST["Service"]["spec"]["selector"]] == [labels] * 3


def default(name: str) -> str:
    """A setting of the compose file, where the environment does not set it."""
    return re.findall(r":-([^}]+)", COMPOSE["vae"]["environment"][name])[0]


def test_what_is_deployed_answers_to_its_names() -> None:
    """The allowed hosts include the names that other containers and pods use."""
    hosts = Hosts(split(default("VAE_ALLOWED_HOSTS")))
    assert all(hosts.allow(f"{name}:8000".encode()) for name in ("vae", "vae-gpu", "ray-head"))
    (container,) = POD["containers"]
    variables = {one["name"]: one for one in container["env"]}
    assert variables["POD_NAMESPACE"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.namespace"
    hosts = Hosts(split(variables["VAE_ALLOWED_HOSTS"]["value"].replace("$(POD_NAMESPACE)", "ours")))
    service = MANIFEST["Service"]["metadata"]["name"]
    for name in (service, f"{service}.ours", f"{service}.ours.svc", f"{service}.ours.svc.cluster.local"):
        assert hosts.allow(name.encode()), name
    assert not hosts.allow(b"vae.theirs")


def compose_timeout_s() -> float:
    return float(default("VAE_TIMEOUT_S"))


def test_compose_stops_no_service_that_may_still_answer() -> None:
    """The grace period is above the drain and the time of a request; the balancer's is above that."""
    least = Settings.model_fields["drain_s"].default + compose_timeout_s()
    grace = [float(COMPOSE[name]["stop_grace_period"].rstrip("s")) for name in ("vae", "balancer")]
    assert least < grace[0] < grace[1]


def test_ray_s_nodes_are_closed() -> None:
    """Both need the token and report nothing; of their ports only that of the service is published."""
    lines = (DEPLOY / "ray.env").read_text().splitlines()
    variables = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert (variables["RAY_AUTH_MODE"], variables["RAY_USAGE_STATS_ENABLED"]) == ("token", "0")
    module, _, name = variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    assert callable(getattr(import_module(module), name))
    nodes = [COMPOSE["ray-head"], COMPOSE["ray-worker"]]
    assert [node["env_file"] for node in nodes] == [["deploy/ray.env"]] * 2
    assert [node["networks"] for node in nodes] == [["ray"]] * 2
    assert [re.sub(r"\$\{.*\}", "", port) for node in nodes for port in node["ports"]] == ["127.0.0.1::8000"]
    assert "--include-dashboard=false" in COMPOSE["ray-head"]["command"][-1]


def test_kubernetes_loses_no_request() -> None:
    """Ready before it gets requests, removed before it stops, and given more time than a request may take."""
    (container,) = POD["containers"]
    probes = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    ready, live = "/health/ready", "/health/live"
    assert probes == {"startupProbe": ready, "readinessProbe": ready, "livenessProbe": live}
    variables = {one["name"]: one for one in container["env"]}
    timeout_s = float(variables["VAE_TIMEOUT_S"]["value"])
    assert timeout_s == compose_timeout_s()
    assert POD["terminationGracePeriodSeconds"] > timeout_s + Settings.model_fields["drain_s"].default + 5
    assert MANIFEST["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_the_balancer_gives_the_service_its_time_and_its_bodies() -> None:
    """nginx's limits match the settings, so that the service's own answers come through."""
    said: dict[str, Any] = dict(re.findall(r"^\s*(\w+) ([^;]+);", (DEPLOY / "nginx.conf").read_text(), re.MULTILINE))
    assert int(said["client_max_body_size"].rstrip("m")) * 2**20 == Settings.model_fields["max_body_bytes"].default
    assert float(said["proxy_read_timeout"].rstrip("s")) > compose_timeout_s()
