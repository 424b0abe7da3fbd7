"""The manifest: what is written is what is read, and what cannot be used is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import manifest as manifests
from service.manifest import ManifestError


@pytest.fixture(scope="module")
def content(digits_models: Path) -> dict[str, Any]:
    """A real manifest as JSON."""
    loaded: dict[str, Any] = json.loads((digits_models / "digits" / "1" / "manifest.json").read_text())
    return loaded


def changed(content: dict[str, Any], path: str, value: Any) -> bytes:
    copy = json.loads(json.dumps(content))
    *parents, last = path.split("/")
    place = copy
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(copy).encode()


def test_what_is_written_is_what_is_read(content: dict[str, Any]) -> None:
    """JSON to Manifest to JSON changes nothing."""
    manifest = manifests.parse(json.dumps(content).encode())
    assert json.loads(manifest.to_json()) == content
    assert manifest.latent_dim == 8


def test_the_fingerprint_is_that_of_the_graphs(content: dict[str, Any]) -> None:
    """Another decoder is another fingerprint; another description is not."""
    first = manifests.parse(json.dumps(content).encode()).fingerprint
    assert manifests.parse(changed(content, "dataset", "others")).fingerprint == first
    assert manifests.parse(changed(content, "graphs/decoder/sha256", "0" * 64)).fingerprint != first


def test_a_model_exported_before_it_could_score_is_read(content: dict[str, Any]) -> None:
    """It has neither the graph nor what goes with it."""
    older = json.loads(changed(content, "graphs/log_joint", None))
    del older["scoring"]
    assert manifests.parse(json.dumps(older).encode()).scoring is None


def calibration(**changes: Any) -> dict[str, Any]:
    return {"factors": {"fast": {"gaussian": 1.2}}, "images": 10, "seed": 0, **changes}


def test_a_calibration_is_read_and_changes_no_fingerprint(content: dict[str, Any]) -> None:
    """It may be there or not, and is written as it was read."""
    with_it, without = (manifests.parse(changed(content, "calibration", value)) for value in (calibration(), None))
    assert without.calibration is None
    assert with_it.calibration == manifests.Calibration({"fast": {"gaussian": 1.2}}, 10, 0)
    assert with_it.fingerprint == without.fingerprint
    assert manifests.parse(with_it.to_json().encode()) == with_it


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("schema_version", 2, "upgrade the service"),
        ("schema_version", None, "schema_version is None"),
        ("likelihood", None, "lacks likelihood"),
        ("mood", "good", "unknown mood"),
        ("input_shape", "28", "input_shape must be"),
        ("input_shape", [1, -8, 8], "input_shape must be"),
        ("input_shape", [8, 8], "input_shape must be [channels, height, width]"),
        ("value_range", [1.0, 0.0], "value_range must be [low, high]"),
        ("graphs/encoder", None, "lacks encoder"),
        ("graphs/decoder/file", "../decoder.onnx", "not a plain file name"),
        ("graphs/decoder/file", "/etc/passwd", "not a plain file name"),
        ("graphs/decoder/inputs", {"z": [0]}, "inputs must be"),
        ("golden/tolerance", "small", "tolerance must be"),
        ("golden", [], "must be an object"),
        ("scoring", None, "needs scoring"),
        ("scoring/binary", "yes", "scoring.binary must be"),
        ("scoring/binarisation", "dynamic", "must be sample or none"),
        ("scoring/elbo_percentiles_nats", [1.0], "101 finite numbers"),
        ("scoring/elbo_percentiles_nats", [-float(k) for k in range(101)], "101 finite numbers"),
        ("scoring/images", None, "lacks images"),
        ("calibration", {"factors": {}}, "calibration. lacks images"),
        ("calibration", calibration(factors={"fast": 1.2}), "calibration.factors must be"),
        ("calibration", calibration(factors={"fats": {"gaussian": 1.2}}), "of fast and refined"),
        ("calibration", calibration(factors={"fast": {"gaussian": 0.0}}), "must be above 0"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_by_name(
    content: dict[str, Any], path: str, value: Any, says: str
) -> None:
    """The message names the key and what is wrong with it."""
    with pytest.raises(ManifestError) as caught:
        manifests.parse(changed(content, path, value))
    assert says in str(caught.value)


VALUES = st.recursive(st.none() | st.integers() | st.text(), st.lists)


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_nonsense_is_refused_and_nothing_else_happens(text: bytes) -> None:
    """Any bytes at all are a ManifestError."""
    with pytest.raises(ManifestError):
        manifests.parse(text)
