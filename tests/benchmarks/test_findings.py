"""Measurements of a benchmark outlast the process that made them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.findings import Findings
from benchmarks.measure import Measure


def test_findings_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Rates stay measures, so that rounds can be added."""
    found = Findings({"rounds": 1, "seconds": 5})
    found.add("mlp-json-64", "ours", Measure(100.0, 2.0, failures=1))
    found.start_s["ours"], found.memory_mib["ours"] = [1.5], [80.0]
    found.note("one is missing")
    found.write(tmp_path / "raw.json")
    again = Findings.read(tmp_path / "raw.json")
    assert again == found
    again.add("mlp-json-64", "ours", Measure(300.0, 4.0))
    assert again.middle("mlp-json-64", "ours", lambda one: one.rate) == 200.0
