"""deploy/kubernetes, built by kubectl and checked by the schemas of Kubernetes and KServe; no cluster is needed.

Each checker lives in an environment of its own below .bench/, with pinned packages. `make client-test` runs this.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
import yaml
from moto.server import ThreadedMotoServer

from tests.clients.conftest import python_of
from training.evaluation.served import started

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
FOLDERS = ("base", "gpu", "monitoring", "kserve")
KSERVE = "serving.kserve.io/"
TEXT_ALONE = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
"""Kinds that no package describes; tests/service/test_deploy.py reads their text."""
Objects = list[dict[str, Any]]


def ran(*command: str | Path, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A finished command, whatever its status."""
    env = {**os.environ, **environment}
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=300, env=env)


def program(name: str) -> Path:
    """A command of the environment for Kubernetes."""
    return Path(python_of("client-kubernetes", "kubernetes")).with_name(name)


def built(folder: str) -> Objects:
    """What `kubectl apply -k` would send."""
    done = ran(program("kubectl"), "kustomize", FOLDER / folder)
    assert done.returncode == 0, done.stderr
    return [*yaml.safe_load_all(done.stdout)]


def of_kubernetes(objects: Objects) -> str:
    """What Kubernetes' own schemas have against objects; nothing if they are valid."""
    done = ran(program("python"), HERE / "kubernetes" / "validate.py", text=json.dumps(objects))
    return done.stdout + done.stderr


def of_kserve(objects: Objects) -> str:
    """What KServe's models have against objects; nothing if they are valid."""
    done = ran(python_of("client-kserve", "kserve"), HERE / "kserve" / "manifests.py", text=json.dumps(objects))
    return (done.stdout + done.stderr).strip()


def pod_of(objects: Objects) -> dict[str, Any]:
    (deployment,) = [each for each in objects if each["kind"] == "Deployment"]
    return deployment["spec"]["template"]["spec"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_builds_and_its_objects_are_valid(folder: str) -> None:
    """No unknown field, none missing, none of another type."""
    objects = built(folder)
    core = [each for each in objects if each["apiVersion"] not in TEXT_ALONE and KSERVE not in each["apiVersion"]]
    assert of_kubernetes(core) == ""
    assert of_kserve([each for each in objects if KSERVE in each["apiVersion"]]) == ""
    others = {each["apiVersion"] for each in objects} & TEXT_ALONE
    assert others == (TEXT_ALONE if folder == "monitoring" else set())


def broken(folder: str, old: str, new: str) -> Objects:
    """The objects of a folder after a change of their JSON."""
    text = json.dumps(built(folder))
    assert old in text
    return json.loads(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"failureThreshold": 6', '"failureTreshold": 6'),
        ('"containerPort": 9000', '"containerPort": "9000"'),
        ('"maxUnavailable"', '"maxUnavailabel"'),
        ('"podSelector"', '"selector"'),
        ('"selector": {"matchLabels"', '"selectors": {"matchLabels"'),
    ],
)
def test_kubernetes_schemas_find_faults(old: str, new: str) -> None:
    """The check above can fail."""
    assert of_kubernetes(broken("base", old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"failureThreshold": 6', '"failureTreshold": 6'),
        ('"containerPort": 9000', '"containerPort": "ops"'),
        ('"scaleTarget": 70', '"scaleTarget": "70"'),
        ('"protocolVersions"', '"protocols"'),
        ('"mountPath": "/mnt', '"path": "/mnt'),
        ('"modelFormat": {"name": "vae", "version": "1"}, ', ""),
    ],
)
def test_kserves_models_find_faults(old: str, new: str) -> None:
    """The check above can fail."""
    assert of_kserve(broken("kserve", old, new))


def test_overlays_change_what_they_say() -> None:
    """A GPU and its image; no number of replicas where KEDA sets it; the dashboard that compose has."""
    (container,) = pod_of(built("base"))["containers"]
    (gpu,) = pod_of(built("gpu"))["containers"]
    assert (container["image"], gpu["image"]) == ("vae-service", "vae-service:gpu")
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert gpu["env"] == container["env"]
    assert gpu["securityContext"] == container["securityContext"]
    kinds = {each["kind"]: each for each in built("monitoring")}
    assert "replicas" not in kinds["Deployment"]["spec"]
    dashboard = (ROOT / "deploy" / "grafana" / "dashboards" / "vae.json").read_text()
    assert kinds["ConfigMap"]["data"] == {"vae.json": dashboard}
    assert {each["metadata"].get("namespace") for each in kinds.values()} == {None, "vae"}  # None is the Namespace's


def test_the_secret_of_the_page_is_the_one_that_pods_mount(tmp_path: Path) -> None:
    """The command of docs/deployment.md makes a valid Secret, whose file is where VAE_API_KEYS looks."""
    (tmp_path / "api_keys").write_text("ours 0123456789abcdef infer\n")
    command = re.findall(r"kubectl (.* create secret .*)", (ROOT / "docs" / "deployment.md").read_text())[0]
    words = command.replace("=api_keys", f"={tmp_path / 'api_keys'}").split()
    done = ran(program("kubectl"), *words, "--dry-run=client", "--output=json")
    secret = json.loads(done.stdout)
    assert of_kubernetes([secret]) == ""
    pod = pod_of(built("base"))
    (volume,) = [one for one in pod["volumes"] if one.get("secret", {}).get("secretName") == secret["metadata"]["name"]]
    (mount,) = [one for one in pod["containers"][0]["volumeMounts"] if one["name"] == volume["name"]]
    ((name, content),) = secret["data"].items()
    environment = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert environment["VAE_API_KEYS"] == f"{mount['mountPath']}/{name}"
    assert base64.b64decode(content) == (tmp_path / "api_keys").read_bytes()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 store whose `bucket/models` has mnist and mnist-2d."""
    for name, value in {"ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        files = fsspec.filesystem("s3", endpoint_url=f"http://{host}:{port}", use_listings_cache=False)
        files.mkdir("bucket")
        for name in ("mnist", "mnist-2d"):
            files.put(f"{ROOT}/models/{name}/", f"bucket/models/{name}/", recursive=True)
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def test_kserves_storage_initialiser_brings_a_model_that_is_served(store: str, tmp_path: Path) -> None:
    """KServe's own downloader, from the manifest's URI to its path; the service is then ready, for that model alone."""
    kinds = {each["kind"]: each for each in built("kserve")}
    (storage,) = kinds["InferenceService"]["spec"]["predictor"]["storageUris"]
    (container,) = kinds["ServingRuntime"]["spec"]["containers"]
    environment = {one["name"]: one["value"].replace("{{.Name}}", "mnist") for one in container["env"]}
    place = tmp_path / Path(storage["mountPath"]).relative_to(environment["VAE_MODELS"])
    download(storage["uri"], place, store)
    assert {path.relative_to(place) for path in place.rglob("*")} == {
        path.relative_to(ROOT / "models/mnist") for path in (ROOT / "models/mnist").rglob("*")
    }
    settings = {"VAE_MODELS": str(tmp_path), "VAE_DEFAULT_MODEL": environment["VAE_DEFAULT_MODEL"], "VAE_THREADS": "1"}
    with started(**settings) as (_, url):
        assert httpx.get(f"{url}/health/ready").json() == {"ready": True, "models": ["mnist"]}
        assert httpx.get(f"{url}/v2/models/mnist.encode/ready").json()["ready"] is True
    without = tmp_path / "without"
    download(storage["uri"].rstrip("/"), without, store)
    assert (without / "-2d").exists()  # what the slash is for


def download(uri: str, folder: Path, store: str) -> None:
    """Copy a URI as an init container of KServe does."""
    python = python_of("client-kserve-storage", "kserve_storage")
    done = ran(python, HERE / "kserve_storage" / "client.py", uri, folder, AWS_ENDPOINT_URL=store)
    assert done.returncode == 0, done.stderr[-2000:]
