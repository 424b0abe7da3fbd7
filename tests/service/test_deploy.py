"""The files of deploy/ and compose agree with the service, as far as their text shows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from docs.reference import PAGES, TABLES, with_lines, with_tables
from service.errors import ReaderFault, ServiceError
from service.observability.metrics import Telemetry
from service.security.hosts import Hosts
from service.settings import PREFIX, Settings, split
from training.evaluation.served import started
from vae_client.client import TIMEOUT_S as CLIENT_TIMEOUT_S

DEPLOY = Path(__file__).parents[2] / "deploy"
DOCKERFILE = (DEPLOY.parent / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())["services"]
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "vae.json").read_text())
OBJECTS: dict[str, dict[str, Any]] = {
    path.relative_to(DEPLOY / "kubernetes").as_posix(): yaml.safe_load(path.read_text())
    for path in sorted((DEPLOY / "kubernetes").glob("*/*.yml"))
}
MANIFEST = {each["kind"]: each for name, each in OBJECTS.items() if name.startswith(("base/", "monitoring/"))}
TEMPLATE = MANIFEST["Deployment"]["spec"]["template"]
POD = TEMPLATE["spec"]
RUNTIME = OBJECTS["kserve/serving-runtime.yml"]["spec"]
PREDICTOR = OBJECTS["kserve/inference-service.yml"]["spec"]["predictor"]
"""KServe merges these two into a pod."""
PODS = {"base": POD, "kserve": {**RUNTIME, **PREDICTOR}}
DEPLOYMENT = (DEPLOY.parent / "docs" / "deployment.md").read_text()
MODELS = DEPLOY.parent / "models"
IMAGE = dict(re.findall(r"(VAE_\w+)=(\S+)", re.findall(r"^ENV VAE_HOST.*", DOCKERFILE, re.MULTILINE)[0]))
"""Settings of the image."""
KEY = "0123456789abcdef-ours"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
PANELS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
TRIGGERS = {each["type"]: each for each in MANIFEST["ScaledObject"]["spec"]["triggers"]}
EXPRESSIONS = [rule["expr"] for rule in ALERTS] + PANELS + [TRIGGERS["prometheus"]["metadata"]["query"]]


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


def container_of(pod: str) -> dict[str, Any]:
    """The container, with KServe's placeholders filled in as KServe does: in its JSON."""
    (container,) = PODS[pod]["containers"]
    named = {"{{.Name}}": "mnist", "{{.Namespace}}": "vae"}
    return json.loads(re.sub(r"{{.*?}}", lambda found: named[found[0]], json.dumps(container)))


def settings_of(pod: str) -> dict[str, str]:
    """The environment of the container, by name; what Kubernetes fills in is of the namespace `vae`."""
    given = {one["name"]: one.get("value", "vae") for one in container_of(pod)["env"]}
    return {name: value.replace("$(POD_NAMESPACE)", given.get("POD_NAMESPACE", "")) for name, value in given.items()}


@pytest.mark.parametrize("pod", PODS)
def test_kubernetes_runs_it_as_compose_does(pod: str) -> None:
    """Not root, a read-only root, no capability, limits, no token, no variables of other services."""
    container = container_of(pod)
    assert PODS[pod]["securityContext"]["runAsNonRoot"]
    assert PODS[pod]["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert container["securityContext"] == confined
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    assert not PODS[pod]["enableServiceLinks"]
    assert not PODS[pod]["automountServiceAccountToken"]


def test_selectors_match_the_pods() -> None:
    """Service, disruption budget, network policy and Prometheus select the pods of the Deployment."""
    labels = TEMPLATE["metadata"]["labels"]
    matched = [MANIFEST[kind]["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")]
    matched += [MANIFEST["PodMonitor"]["spec"]["selector"]["matchLabels"]]
    matched += [MANIFEST["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]]
    assert [*matched, MANIFEST["Service"]["spec"]["selector"]] == [labels] * 5


def test_ports_exist_and_the_service_hides_health_and_metrics() -> None:
    """Every port that an object names is one of the container; callers reach the requests' port alone."""
    ports = {one["name"]: one["containerPort"] for one in container_of("base")["ports"]}
    assert ports == {"http": Settings.model_fields["port"].default, "ops": int(settings_of("base")["VAE_OPS_PORT"])}
    assert [one["targetPort"] for one in MANIFEST["Service"]["spec"]["ports"]] == ["http"]
    assert [one["port"] for one in MANIFEST["PodMonitor"]["spec"]["podMetricsEndpoints"]] == ["ops"]
    callers, prometheus = MANIFEST["NetworkPolicy"]["spec"]["ingress"]
    assert [one["port"] for one in callers["ports"] + prometheus["ports"]] == ["http", "ops"]
    assert MANIFEST["NetworkPolicy"]["spec"]["egress"] == []
    kserve = {one["name"]: one["containerPort"] for one in container_of("kserve")["ports"]}
    assert list(kserve.items()) == list(ports.items())  # KServe sends requests to the first one


@pytest.mark.parametrize("name", [name for name in OBJECTS if not name.endswith("kustomization.yml")])
def test_every_variable_is_a_setting(name: str) -> None:
    """A misspelt variable would keep the service from starting."""
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    assert set(re.findall(r"name: (VAE_\w+)", (DEPLOY / "kubernetes" / name).read_text())) <= known


@pytest.mark.parametrize("pod", PODS)
def test_the_service_starts_with_the_manifest_and_answers_its_probes(pod: str, tmp_path: Path) -> None:
    """With the image's and the manifest's environment, volumes at other places and free ports: probes, keys, models."""
    container, environment = container_of(pod), IMAGE | settings_of(pod)
    places = {IMAGE["VAE_MODELS"]: MODELS} | {one["mountPath"]: tmp_path for one in container["volumeMounts"]}
    if pod == "kserve":
        places[environment["VAE_MODELS"]] = tmp_path
        shutil.copytree(MODELS / "mnist", tmp_path / "mnist")
    inside = re.compile(rf"^({'|'.join(places)})(?=/|$)")
    environment = {name: inside.sub(lambda found: str(places[found[1]]), value) for name, value in environment.items()}
    (tmp_path / "api_keys").write_text(f"ours {KEY} infer\n")
    ours = {"VAE_HOST": "127.0.0.1", "VAE_PORT": "0", "VAE_OPS_PORT": "0"}
    with started(**{**environment, **ours}) as (process, url):
        assert process.stdout is not None
        ops = re.search(r"health and metrics on (\S+)", "".join(process.stdout.readline() for _ in range(2)))
        assert ops
        numbered = {one["name"]: one["containerPort"] for one in container["ports"]}
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[name]["httpGet"]
            assert numbered.get(probe["port"], probe["port"]) == numbered["ops"]
            assert httpx.get(ops[1] + probe["path"]).status_code == 200, name
            assert httpx.get(url + probe["path"]).status_code == 404, name
        assert "vae_queued_rows" in httpx.get(f"{ops[1]}/metrics").text
        keyed = {"authorization": f"Bearer {KEY}"} if "VAE_API_KEYS" in environment else {}
        for host in split(environment["VAE_ALLOWED_HOSTS"]):
            headers = {**keyed, "host": host.replace("*", "mnist-vae")}
            assert httpx.get(f"{url}/v2/models/mnist/ready", headers=headers).json() == {"name": "mnist", "ready": True}
        assert httpx.get(f"{url}/v2/models/mnist.encode/ready", headers=keyed).status_code == 200
        assert httpx.get(f"{url}/v2/models/mnist.encode/ready").status_code == (401 if keyed else 200)
        assert httpx.get(f"{url}/v2/health/ready").json() == {"ready": True}


def test_keys_come_from_the_secret_that_the_page_makes() -> None:
    """The command's name and file are those of the volume; only the service's user may read it."""
    (volume,) = [one["secret"] for one in POD["volumes"] if "secret" in one]
    file = Path(settings_of("base")["VAE_API_KEYS"]).name
    assert f"create secret generic {volume['secretName']} --from-file={file}" in DEPLOYMENT
    assert volume["defaultMode"] == 0o440
    assert POD["securityContext"]["fsGroup"] == POD["securityContext"]["runAsGroup"]


def test_kserve_downloads_one_model_and_no_other() -> None:
    """The model is the InferenceService's; the slash keeps out models whose names begin alike."""
    service = OBJECTS["kserve/inference-service.yml"]
    (storage,) = PREDICTOR["storageUris"]
    name = service["metadata"]["name"]
    assert storage["uri"].endswith(f"/{name}/")
    assert storage["mountPath"] == f"{settings_of('kserve')['VAE_MODELS']}/{name}"
    assert PREDICTOR["model"]["runtime"] == OBJECTS["kserve/serving-runtime.yml"]["metadata"]["name"]
    assert PREDICTOR["model"]["protocolVersion"] in RUNTIME["protocolVersions"]
    formats = [(one["name"], one["version"]) for one in RUNTIME["supportedModelFormats"]]
    assert tuple(PREDICTOR["model"]["modelFormat"].values()) in formats


def test_the_operators_alerts_are_those_of_compose() -> None:
    """monitoring/alerts.yml has the groups of deploy/alerts.yml: copy them after a change."""
    assert MANIFEST["PrometheusRule"]["spec"]["groups"] == yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    monitor = MANIFEST["PodMonitor"]["spec"]
    assert TEMPLATE["metadata"]["labels"][monitor["jobLabel"]] == "vae"


def test_keda_scales_the_deployment() -> None:
    """As far as its text shows: KEDA's kinds come in no package that could check them."""
    scaled = MANIFEST["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == MANIFEST["Deployment"]["metadata"]["name"]
    assert scaled["minReplicaCount"] == MANIFEST["Deployment"]["spec"]["replicas"] < scaled["maxReplicaCount"]
    assert TRIGGERS.keys() == {"prometheus", "cpu"}
    metadata = TRIGGERS["prometheus"]["metadata"]
    assert metadata.keys() == {"serverAddress", "query", "threshold"}
    assert all(isinstance(value, str) for trigger in TRIGGERS.values() for value in trigger["metadata"].values())
    assert 'job="vae",namespace="vae"' in metadata["query"]
    assert float(metadata["threshold"]) < Settings.model_fields["max_rows"].default


def default(name: str) -> str:
    """A setting of the compose file, where the environment does not set it."""
    return re.findall(r":-([^}]+)", COMPOSE["vae"]["environment"][name])[0]


def test_what_is_deployed_answers_to_its_names() -> None:
    """The allowed hosts include the names that other containers and pods use."""
    hosts = Hosts(split(default("VAE_ALLOWED_HOSTS")))
    assert all(hosts.allow(f"{name}:8000".encode()) for name in ("vae", "vae-gpu", "ray-head"))
    (variable,) = [one for one in container_of("base")["env"] if one["name"] == "POD_NAMESPACE"]
    assert variable["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.namespace"
    hosts = Hosts(split(settings_of("base")["VAE_ALLOWED_HOSTS"].replace("vae.vae", "vae.ours")))
    service = MANIFEST["Service"]["metadata"]["name"]
    for name in (service, f"{service}.ours", f"{service}.ours.svc", f"{service}.ours.svc.cluster.local"):
        assert hosts.allow(name.encode()), name
    assert not hosts.allow(b"vae.theirs")


TIMEOUT_S = Settings.model_fields["timeout_s"].default
"""What compose and Kubernetes leave as it is."""


def test_a_request_has_the_services_own_time_everywhere() -> None:
    """Compose passes on what the environment sets, Kubernetes nothing, and the client waits as long as the service."""
    assert "VAE_TIMEOUT_S" in COMPOSE["vae"]["environment"]
    assert "VAE_TIMEOUT_S" not in {one["name"] for one in POD["containers"][0]["env"]}
    assert TIMEOUT_S == CLIENT_TIMEOUT_S


def test_compose_stops_no_service_that_may_still_answer() -> None:
    """The grace period is above the drain and the time of a request; the balancer's is above that."""
    least = Settings.model_fields["drain_s"].default + TIMEOUT_S
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


@pytest.mark.parametrize("pod", PODS)
def test_kubernetes_loses_no_request(pod: str) -> None:
    """Ready before it gets requests, removed before it stops, and given more time than a request may take."""
    container = container_of(pod)
    probes = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    ready, live = "/health/ready", "/health/live"
    assert probes == {"startupProbe": ready, "readinessProbe": ready, "livenessProbe": live}
    assert "VAE_TIMEOUT_S" not in settings_of(pod)
    assert PODS[pod]["terminationGracePeriodSeconds"] > TIMEOUT_S + Settings.model_fields["drain_s"].default + 5
    assert container["lifecycle"]["preStop"]["exec"]["command"][-1] == "import time; time.sleep(5)"
    assert MANIFEST["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_the_balancer_gives_the_service_its_time_and_its_bodies() -> None:
    """nginx's limits match the settings, so that the service's own answers come through."""
    said: dict[str, Any] = dict(re.findall(r"^\s*(\w+) ([^;]+);", (DEPLOY / "nginx.conf").read_text(), re.MULTILINE))
    assert int(said["client_max_body_size"].rstrip("m")) * 2**20 == Settings.model_fields["max_body_bytes"].default
    assert float(said["proxy_read_timeout"].rstrip("s")) > TIMEOUT_S
