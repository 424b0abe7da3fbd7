"""The service below a path of a proxy: nginx, with and without removing the path."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from training.evaluation.served import started

ROOT = Path(__file__).parents[2]
CONFIGURATION = """
daemon off;
master_process off;
pid {folder}/pid;
error_log stderr warn;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    {servers}
}}
"""
SERVER = """
    server {{
        listen 127.0.0.1:{port};
        location /vae/ {{
            proxy_pass {target};
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            {header}
        }}
    }}
"""
TOLD = "proxy_set_header X-Forwarded-Prefix /vae;"
SETTINGS = {"set": {"VAE_ROOT_PATH": "/vae"}, "told": {"VAE_TRUSTED_PROXIES": "127.0.0.1"}}


@pytest.fixture(scope="module")
def services(small_models: Path) -> Iterator[dict[str, str]]:
    """One service with the path as a setting, and one that trusts its proxy's header."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(started(VAE_MODELS=str(small_models), VAE_THREADS="1", **settings))[1]
            for name, settings in SETTINGS.items()
        }


@pytest.fixture(scope="module")
def proxies(services: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """URLs of nginx in front of each, with and without the path removed."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if not nginx:
        pytest.skip("needs nginx: apt-get install nginx-light")
    folder = tmp_path_factory.mktemp("nginx")
    urls, servers = {}, []
    for name, url in services.items():
        for kind, target in (("removed", f"{url}/"), ("kept", url)):
            port = free_port()
            servers.append(SERVER.format(port=port, target=target, header=TOLD if name == "told" else ""))
            urls[f"{name}, {kind}"] = f"http://127.0.0.1:{port}"
    (folder / "nginx.conf").write_text(CONFIGURATION.format(folder=folder, servers="".join(servers)))
    process = subprocess.Popen([nginx, "-e", "stderr", "-p", folder, "-c", folder / "nginx.conf"])
    try:
        for url in urls.values():
            await_listener(url)
        yield urls
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def await_listener(url: str) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with suppress(httpx.TransportError):
            httpx.get(url)
            return
        time.sleep(0.05)
    raise AssertionError("nginx does not listen")


@pytest.mark.parametrize("proxy", ["set, removed", "set, kept", "told, removed", "told, kept"])
def test_the_documentation_works_below_a_path(proxies: dict[str, str], proxy: str) -> None:
    """The page, its files, the OpenAPI document and the calls that it describes work below a path."""
    home = proxies[proxy] + "/vae"
    page = httpx.get(f"{home}/docs")
    assert page.status_code == 200
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text) + re.findall(r"url: '([^']+)'", page.text)
    assert len(named) == 4
    for name in named:
        place = urljoin(f"{home}/docs", name)
        assert place.startswith(f"{home}/")
        assert httpx.get(place).status_code == 200
    document = httpx.get(urljoin(f"{home}/docs", named[-1])).json()
    (server,) = document["servers"]
    base = urljoin(f"{home}/openapi.json", server["url"])
    assert base == home
    assert httpx.get(f"{base}/v1/models").json()["models"]
    assert httpx.post(f"{base}/v1/sample", params={"count": 1}).status_code == 200
    assert httpx.post(f"{base}/v1/dream").json()["detail"].startswith("nothing is at /v1/dream")


@pytest.mark.parametrize("proxy", ["set, removed", "set, kept", "told, removed", "told, kept"])
def test_the_page_for_people_works_below_a_path(proxies: dict[str, str], proxy: str) -> None:
    """Its files and its calls are found below the path, which the proxy or the service gives its slash."""
    home = proxies[proxy] + "/vae"
    page = httpx.get(home, follow_redirects=True)
    assert (page.status_code, str(page.url)) == (200, f"{home}/")
    named = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    assert named
    for name in [*named, "page/access", "v1/models"]:
        assert httpx.get(urljoin(str(page.url), name)).status_code == 200


@pytest.mark.parametrize("proxy", ["set, removed", "set, kept", "told, removed", "told, kept"])
def test_redirects_stay_below_the_path(proxies: dict[str, str], proxy: str) -> None:
    """A redirect keeps the path and the host."""
    home = proxies[proxy] + "/vae"
    answer = httpx.get(f"{home}/v1/models/", follow_redirects=True)
    assert (answer.status_code, str(answer.url)) == (200, f"{home}/v1/models")
    answer = httpx.post(f"{home}/v1/sample/?count=1&seed=7", follow_redirects=True)
    assert (answer.status_code, str(answer.url)) == (200, f"{home}/v1/sample?count=1&seed=7")


def test_a_prefix_is_believed_of_trusted_proxies_alone(services: dict[str, str]) -> None:
    """The prefix header counts only from trusted proxies, and only if it is a plain path."""

    def servers(service: str, *prefixes: str) -> object:
        lines = [("x-forwarded-prefix", prefix) for prefix in prefixes]
        return httpx.get(f"{services[service]}/openapi.json", headers=lines).json().get("servers")

    assert servers("told") is None
    assert servers("told", "/a/") == [{"url": "/a"}]
    assert servers("told", "/a, /b") == servers("told", "/a", "/b") == [{"url": "/a/b"}]
    for wrong in ("//evil.example", "https://evil.example", "/v1", "/a?b", "a", "/", ""):
        assert servers("told", wrong) is None
    assert servers("set", "/a") == [{"url": "/vae"}]
