"""The manifest: what is written is what is read, and what cannot be used is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.contract import manifest as manifests
from service.contract.graphs import FEATURES, GRAPHS, shape_of
from service.contract.manifest import ManifestError

MODELS = Path(__file__).parents[2] / "models"


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
        place.pop(last, None)
    else:
        place[last] = value
    return json.dumps(copy).encode()


def test_what_is_written_is_what_is_read(content: dict[str, Any]) -> None:
    """JSON to Manifest to JSON changes nothing."""
    manifest = manifests.parse(json.dumps(content).encode())
    assert json.loads(manifest.to_json()) == content
    assert manifest.latent_dim == 8


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/*/manifest.json")), ids=lambda path: path.parts[-3])
def test_a_shipped_manifest_is_written_as_it_stands(path: Path) -> None:
    """Byte for byte, but for optional keys at its end that are newer than the model."""
    text = path.read_text()
    again = manifests.parse(text.encode()).to_json()
    assert again.startswith(text.removesuffix("\n}\n"))
    added = json.loads(again).keys() - json.loads(text).keys()
    assert added <= {"scoring", "calibration", "tileable", "card"}
    assert manifests.parse(again.encode()).to_json() == again


def test_a_manifest_cannot_be_changed(content: dict[str, Any]) -> None:
    """Whoever needs another one makes a copy."""
    manifest = manifests.parse(json.dumps(content).encode())
    with pytest.raises(ValidationError, match="frozen"):
        manifest.name = "other"  # type: ignore[misc]


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
    assert with_it.calibration == manifests.Calibration(factors={"fast": {"gaussian": 1.2}}, images=10, seed=0)
    assert with_it.fingerprint == without.fingerprint
    assert manifests.parse(with_it.to_json().encode()) == with_it


def conditional(**features: list[int]) -> dict[str, Any]:
    """A manifest of the three graphs of a conditional model; `features` may change their axes in a graph."""
    input_shape, latent_shape, families = [3, "height", "width"], [6, "height/8", "width/8"], ["gaussian", "processed"]
    graphs = {}
    for name in ("restoration", "completion", "noise"):
        signature = GRAPHS[name]
        inputs, outputs = (
            {
                key: features.get(name, [5, "height/2", "width/2"])
                if axes == FEATURES
                else shape_of(axes, input_shape, latent_shape, len(families))
                for key, axes in tensors.items()
            }
            for tensors in (signature.inputs, signature.outputs)
        )
        graphs[name] = {"file": f"{name}.onnx", "sha256": "0" * 64, "inputs": inputs, "outputs": outputs}
    return {
        "schema_version": 1,
        "name": "pictures",
        "version": "1",
        "input_shape": input_shape,
        "latent_shape": latent_shape,
        "size": {"multiple_of": 8, "min": 16},
        "noise_families": families,
        "graphs": graphs,
        "golden": {"file": "golden.npz", "sha256": "0" * 64, "rows": 2, "tolerance": 1e-4, "height": 16, "width": 24},
    }


def test_a_conditional_model_needs_no_encoder_and_no_decoder() -> None:
    """Its golden rows hold the features at their size; it is written as it was read."""
    manifest = manifests.manifest_of(conditional())
    shapes = manifest.golden_shapes()
    assert shapes["restoration/features"] == shapes["completion/features"] == (2, 5, 8, 12)
    assert shapes["completion/eps"] == (2, 6, 2, 3)
    assert shapes["completion/log_p"] == (2,)
    assert manifests.parse(manifest.to_json().encode()) == manifest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (conditional(completion=[5]), "completion.inputs.features must have the shape that restoration gives it"),
        (
            {**conditional(), "graphs": {"completion": conditional()["graphs"]["completion"]}},
            "graphs lacks encoder, posterior, decoder and restoration",
        ),
    ],
)
def test_completion_takes_what_restoration_gives(content: dict[str, Any], says: str) -> None:
    """Without it, or with other features, the manifest is refused."""
    with pytest.raises(ManifestError, match=says):
        manifests.manifest_of(content)


def test_a_model_restores_in_one_way(content: dict[str, Any]) -> None:
    """A manifest with both `restoration` and `recognition` is refused."""
    both = json.loads(json.dumps(content))
    taken = {"y": [1, 8, 8], "mask": [1, 8, 8], "level": [4]}
    given = {"restored": [1, 8, 8], "variance": [1, 8, 8], "features": [2]}
    both["graphs"]["restoration"] = {"file": "r.onnx", "sha256": "0" * 64, "inputs": taken, "outputs": given}
    with pytest.raises(ManifestError, match="graphs has both restoration and recognition"):
        manifests.manifest_of(both)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("schema_version", 2, "upgrade the service"),
        ("schema_version", None, "schema_version is null"),
        ("latent_shape", None, "lacks latent_shape"),
        ("mood", "good", "unknown mood"),
        ("input_shape", "28", "input_shape must be"),
        ("input_shape", [1, -8, 8], "input_shape.1 must be a length below 2**20"),
        ("input_shape", [8, 8], "input_shape must be [channels, height, width]"),
        ("value_range", [1.0, 0.0], "value_range must be [0.0, 1.0] or [-1.0, 1.0]"),
        ("graphs", {}, "lacks encoder, posterior, decoder and restoration"),
        ("graphs/decoder/file", "../decoder.onnx", "graphs.decoder.file must be a plain file name"),
        ("graphs/decoder/file", "/etc/passwd", "graphs.decoder.file must be a plain file name"),
        ("graphs/decoder/inputs", {"z": [0]}, "graphs.decoder.inputs.z.0 must be a length below 2**20"),
        ("golden/tolerance", "small", "tolerance must be"),
        ("golden", [], "must be an object"),
        ("scoring", None, "needs scoring"),
        ("scoring/binary", "yes", "scoring.binary must be"),
        ("scoring/binarisation", "dynamic", "scoring.binarisation must be 'sample' or 'none', not 'dynamic'"),
        ("scoring/elbo_percentiles_nats", [1.0], "101 finite numbers"),
        ("scoring/elbo_percentiles_nats", [-float(k) for k in range(101)], "101 finite numbers"),
        ("scoring/images", None, "lacks images"),
        ("calibration", {"factors": {}}, "calibration lacks images"),
        ("calibration", calibration(factors={"fast": 1.2}), "calibration.factors.fast must be an object"),
        ("calibration", calibration(factors={"fats": {"gaussian": 1.2}}), "must be fast or refined"),
        (
            "calibration",
            calibration(factors={"fast": {"gaussian": 0.0}}),
            "calibration.factors.fast.gaussian must be greater than 0",
        ),
        (
            "calibration",
            calibration(curves={"fast": {"gaussian": {"levels": [0.1, 0.1], "factors": [1.0, 1.0]}}}),
            "calibration.curves.fast.gaussian.levels must be rising numbers",
        ),
        (
            "calibration",
            calibration(curves={"fast": {"gaussian": {"levels": [0.1, 0.2], "factors": [1.0]}}}),
            "calibration.curves.fast.gaussian has 1 factors for 2 levels",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_by_name(
    content: dict[str, Any], path: str, value: Any, says: str
) -> None:
    """The message names the key and what is wrong with it."""
    with pytest.raises(ManifestError) as caught:
        manifests.parse(changed(content, path, value))
    assert says in str(caught.value)


def digits(count: int) -> str:
    return "1" + "0" * count


def tensors(channels: int, *latent: int | str) -> dict[str, Any]:
    """A version of an encoder and a decoder for images of free size."""
    image = [channels, "height", "width"]
    graphs = {
        "encoder": {"inputs": {"x": image}, "outputs": {"mean": [*latent], "log_var": [*latent]}},
        "decoder": {"inputs": {"z": [*latent]}, "outputs": {"x_mean": image}},
    }
    for name, graph in graphs.items():
        graph |= {"file": f"{name}-{channels}.onnx", "sha256": digits(1).zfill(64)}
    golden = {"file": f"golden-{channels}.npz", "sha256": "0" * 64, "rows": 2, "tolerance": 1e-3}
    return {
        "input_shape": image,
        "latent_shape": [*latent],
        "graphs": graphs,
        "golden": {**golden, "height": 32, "width": 48},
    }


FREE: dict[str, Any] = {
    "schema_version": 1,
    "name": "photo",
    "version": "1",
    "size": {"multiple_of": 8, "min": 16, "max": 8192},
    **tensors(3, 4, "height/8", "width/8"),
}


def test_a_manifest_of_serving_alone_is_enough() -> None:
    """Sizes are free, latents are a fraction of them, and what is only for people may be absent."""
    manifest = manifests.parse(json.dumps(FREE).encode())
    assert (manifest.prior, manifest.likelihood, manifest.value_range) == (None, "", [0.0, 1.0])
    assert manifest.golden_shapes()["encoder/mean"] == (2, 4, 4, 6)
    assert [manifest.size.padded(length) for length in (1, 16, 17, 24)] == [16, 16, 24, 24]  # type: ignore[union-attr]
    assert manifests.parse(manifest.to_json().encode()) == manifest


def test_variants_share_a_fingerprint_and_differ_in_graphs() -> None:
    """Each view describes one variant and lists the others; another graph of any of them is another fingerprint."""
    content = {**FREE, "variants": [tensors(1, 2, "height/8", "width/8")]}
    manifest = manifests.parse(json.dumps(content).encode())
    colour, grey = manifest.views()
    assert colour == manifest
    assert (colour.channels, grey.channels) == (3, 1)
    assert grey.graphs["encoder"].file == "encoder-1.onnx"
    files = ("encoder-{}.onnx", "decoder-{}.onnx", "golden-{}.npz")
    assert [one.file for one in grey.files()] == [file.format(channels) for channels in (1, 3) for file in files]
    assert colour.fingerprint == grey.fingerprint
    content["variants"][0]["graphs"]["decoder"]["sha256"] = "1" * 64
    assert manifests.parse(json.dumps(content).encode()).fingerprint != manifest.fingerprint


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": None}, "size is needed"),
        ({"size": {"multiple_of": 8, "min": 12, "max": 64}}, "both multiples of multiple_of (8)"),
        ({"input_shape": [3, 32, 48]}, "size is only for images"),
        ({"input_shape": [3, "height", 48]}, "input_shape must be three numbers or"),
        ({"input_shape": ["height", "height", "width"]}, "input_shape must be three numbers or"),
        ({"input_shape": [3, "depth", "width"]}, "input_shape.1 must be a length"),
        ({"latent_shape": [4, "height/0", "width/8"]}, "latent_shape.1 must be a length"),
        ({"latent_shape": [4, "height/4", "width/8"]}, 'graphs.decoder.inputs.z must be [4, "height/4"'),
        ({"latent_shape": [True]}, "latent_shape.0 must be"),
        ({"latent_shape": [1.5]}, "latent_shape.0 must be"),
        ({"golden": {**FREE["golden"], "height": 33}}, "does not fit the golden images"),
        ({"golden": {**FREE["golden"], "height": 2**16, "width": 2**16}}, "the golden rows would be"),
        ({"variants": [tensors(3, 4, "height/8", "width/8")]}, "a number of channels of its own"),
        ({"variants": [{**tensors(1, 4, "height/8", "width/8"), "golden": FREE["golden"]}]}, "a name of its own"),
        ({"card": {"file": "../README.md", "sha256": "0" * 64}}, "card.file must be README.md"),
        ({"tiles": {"margin": -1, "exact": True}}, "tiles.margin must be"),
        ({"groups": [{"name": "top", "shape": [1, 2, 2], "channels": [4, 4], "block": 1}]}, "must be [first, end]"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_together_are_refused_by_name(changes: dict[str, Any], says: str) -> None:
    """The message names the key and what it must be."""
    content = {key: value for key, value in {**FREE, **changes}.items() if value is not None}
    with pytest.raises(ManifestError) as caught:
        manifests.parse(json.dumps(content).encode())
    assert says in str(caught.value)


VALUES = st.recursive(st.none() | st.integers() | st.text(), st.lists)


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_nonsense_is_refused_and_nothing_else_happens(text: bytes) -> None:
    """Any bytes at all are a ManifestError."""
    with pytest.raises(ManifestError):
        manifests.parse(text)


DEEP = "[" * 100_000 + "]" * 100_000
NESTED = "[" * 40 + "]" * 40


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("quality", '{"mse": NaN}', "not finite"),
        ("quality", '{"mse": -Infinity}', "not finite"),
        ("quality", '{"mse": 1e999}', "not finite"),
        ("value_range", "[0.0, Infinity]", "not finite"),
        ("value_range", "[0.0, 1e300]", "[-1.0, 1.0]"),
        ("quality", f'{{"mse": {digits(30)}}}', "more than 64 bits"),
        ("quality", f'{{"mse": {digits(5000)}}}', "not JSON"),
        ("input_shape", f"[1, 28, {digits(400)}]", "more than 64 bits"),
        ("schema_version", digits(30), "more than 64 bits"),
        ("schema_version", "true", "schema_version must be a valid integer, not true"),
        ("schema_version", "1.0", "schema_version must be a valid integer, not 1.0"),
        ("training", f'{{"a": {DEEP}}}', "levels"),
        ("training", f'{{"a": {NESTED}}}', "levels"),
        ("training", '{"a": 1, "a": 2}', "a stands twice"),
        ("training", f"{{{', '.join(f'{json.dumps(str(k))}: 1' for k in (*range(50_000), 49_999))}}}", "stands twice"),
        ("training", '{"a": "\\ud800"}', "half a character"),
        ("training", '{"\\udfff": 1}', "half a character"),
        ("name", '"caf\\u00e9"', "name must be letters"),
        ("name", '"\\u0130"', "name must be letters"),
        ("name", '"a\\u0000"', "name must be letters"),
        ("version", '"../1"', "version must be letters"),
        ("version", '""', "version must be letters"),
        ("input_shape", "[1048575, 1048575, 1048575]", "input_shape must be"),
        ("latent_shape", f"[{', '.join(['1'] * 1000)}]", "latent_shape has 1000 entries"),
        ("latent_shape", "[]", "latent_shape must be"),
        ("noise_families", json.dumps([f"f{k}" for k in range(100_000)]), "has 100000 entries, at most 128 are read"),
        ("noise_families", json.dumps([f"f{k}" for k in range(10_000)]), "has 10000 entries, at most 128 are read"),
        ("noise_families", '["a", "a"]', "noise_families must be different"),
        ("noise_families", '["\\u202e"]', "noise_families must be different plain names"),
        ("likelihood", '{"a": 1}', "likelihood must be a valid string"),
        ("graphs", json.dumps({f"g{k}": {} for k in range(1000)}), "at most 64"),
        ("graphs", "[]", "graphs must be"),
        ("mood\\u001b[31m", "1", "has unknown 'mood"),
        ("x" * 100_000, "1", "has unknown 'xxx"),
        ("training", f'"{"x" * 2**20}"', "larger than the 1048576 bytes"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_a_hostile_manifest_is_one_short_line(content: dict[str, Any], key: str, value: str, says: str) -> None:
    """Printable and in ASCII, and without what Python says of its own values."""
    others = {name: part for name, part in content.items() if name != key}
    text = f'{json.dumps(others)[:-1]}, "{key}": {value}}}'.encode()
    with pytest.raises(ManifestError) as caught:
        manifests.parse(text)
    line = str(caught.value)
    assert says in line
    assert line.isprintable()
    assert line.isascii()
    assert len(line) < 500


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_a_manifest_is_utf8(content: dict[str, Any], encoding: str) -> None:
    """With or without a byte order mark, as editors on Windows write."""
    text = json.dumps({**content, "dataset": "caf\u00e9"}, ensure_ascii=False)
    assert manifests.parse(text.encode("utf-8-sig")) == manifests.parse(text.encode())
    with pytest.raises(ManifestError, match="not JSON in UTF-8"):
        manifests.parse(text.encode(encoding))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in parts for place in places(part, (*path, key)))]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=8,
)


@given(st.data())
def test_whatever_stands_in_a_manifest_it_is_read_or_refused(content: dict[str, Any], data: st.DataObject) -> None:
    """And what is read can be written by any JSON writer and read again."""
    changed = json.loads(json.dumps(content))
    *parents, last = data.draw(st.sampled_from([place for place in places(content) if place]))
    inner = changed
    for parent in parents:
        inner = inner[parent]
    inner[last] = data.draw(ANYTHING)
    refused = ""
    try:
        manifest = manifests.parse(json.dumps(changed).encode())
    except ManifestError as error:
        refused = str(error)
    if refused:
        assert refused.isprintable()
        assert len(refused) < 1000
        return
    assert manifests.parse(manifest.to_json().encode()) == manifest
    orjson.dumps(manifest.model_dump())
