"""Prometheus scrapes every replica, and every query of dashboard and alerts has an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from tests.container.engine import ROOT, Stack, docker, published, until

pytestmark = pytest.mark.container
ALERTS = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "vae.json").read_text())
CASES = Path(__file__).with_name("alerts.test.yml")
PIXELS = np.zeros((1, 1, 28, 28), np.float32).tobytes()


class Prometheus:
    """Client of Prometheus' HTTP interface."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def ask(self, path: str, **query: str) -> Any:
        """The data of an answer."""
        answer = self._http.get(f"/api/v1/{path}", params=query)
        assert answer.status_code == httpx.codes.OK, answer.text
        return answer.json()["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now."""
        return self.ask("query", query=expression)["result"]


@pytest.fixture(scope="module")
def prometheus(stack: Stack) -> Iterator[Prometheus]:
    """Prometheus, after it has scraped every replica before and after some requests."""
    replicas = stack.containers("vae")
    with httpx.Client(base_url=published(stack.containers("prometheus")[0], 9090), timeout=30) as http:
        prometheus = Prometheus(http)
        until(lambda: len(prometheus.query('up{job="vae"} == 1')) == len(replicas))
        for container in replicas:
            url = f"{published(container, 8000)}/v1/encode"
            httpx.post(url, content=PIXELS, headers={"content-type": "application/octet-stream"}, timeout=30)
        until(lambda: looked_at_work(prometheus, len(replicas)))
        yield prometheus


def looked_at_work(prometheus: Prometheus, replicas: int) -> bool:
    """Whether it has scraped each replica's requests twice, as a rate needs."""
    seen = prometheus.query("max by (instance) (count_over_time(vae_requests_total[5m])) >= 2")
    return len(seen) >= replicas


def test_every_panel_has_data(prometheus: Prometheus) -> None:
    """Every panel's query gives data, with Grafana's variables filled in."""
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert len(expressions) > 10
    for expression in expressions:
        found = prometheus.query(expression.replace("$__rate_interval", "5m").replace("$model", ".*"))
        assert found, expression
    assert prometheus.query("sum(vae_requests_total)")[0]["value"][1] != "0"


def test_the_alerts_are_loaded_and_silent(prometheus: Prometheus) -> None:
    """Prometheus loads every rule, evaluates it without an error, and raises no alert in normal operation."""
    rules = prometheus.ask("rules")["groups"][0]["rules"]
    assert [rule["name"] for rule in rules] == [rule["alert"] for rule in ALERTS]
    assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []
    for rule in ALERTS:
        if rule["alert"] != "VaeDown":  # replicas were stopped on purpose a moment ago
            assert prometheus.query(rule["expr"]) == [], rule["alert"]


def test_the_alerts_tell_what_they_promise(stack: Stack) -> None:
    """promtool feeds each fault's series to the rules: exactly its alert is raised."""
    cases = CASES.read_text()
    assert all(f"alertname: {rule['alert']}\n" in cases for rule in ALERTS)
    container = stack.containers("prometheus")[0]
    docker("exec", container, "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
    played = "cat > /tmp/cases.yml && promtool test rules /tmp/cases.yml"
    assert "SUCCESS" in docker("exec", "--interactive", container, "sh", "-c", played, input=cases)
