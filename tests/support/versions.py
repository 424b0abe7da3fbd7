"""Small versions whose ONNX graphs are written by hand: nothing is trained or exported, so each takes milliseconds."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from service.contract.graphs import FEATURES, GRAPHS, NOISE, Axis, at_size, shape_of
from service.contract.manifest import Graph, digest, manifest_of
from service.repository.version import assemble, open_version
from service.runtime.model import Model
from service.runtime.session import Session

Rows = NDArray[np.float32]
Shapes = dict[str, list[Axis]]
HEAD = '<ir_version: 10, opset_import: ["" : 20]>'
ROWS, SEED, GOLDEN_SIZE = 3, 5, (8, 12)
MULTIPLE = 4
"""Heights and widths of the graphs of `free_version` are multiples of this."""


class Parts(NamedTuple):
    """One variant of a version.

    Attributes:
        input_shape: (c, h, w); height and width may be free.
        latent_shape: Shape of one latent.
        bodies: The nodes of each graph in ONNX's text format.
        weights: Constants that they use, by name.
        more: Further keys of the variant in the manifest.
        features: Shape of the features of a conditional model.
        golden_size: Height and width of the golden images, where they are free.
    """

    input_shape: list[Axis]
    latent_shape: list[Axis]
    bodies: dict[str, str]
    weights: dict[str, Any]
    more: dict[str, Any]
    features: Sequence[Axis] = ()
    golden_size: tuple[int, int] = GOLDEN_SIZE


def free_version(
    folder: Path,
    channels: Sequence[int] = (3,),
    value_range: tuple[float, float] = (0.0, 1.0),
    graphs: Collection[str] = ("encoder", "decoder"),
    prior: str | None = "standard_normal",
    **changes: Any,
) -> Path:
    """Write a fully convolutional version for images of any size.

    Its latents are (2, height/4, width/4). Over HTTP its answers are the same for both value ranges. Parts of an image
    give the answers of the whole image, but for a margin of 8 pixels.

    Args:
        folder: models/<name>/<version>.
        channels: Channels of each variant.
        value_range: Black and white in its graphs.
        graphs: Some of encoder, decoder, log_joint and the four of restoration, or `restoration` for all of these.
        prior: Name of the prior; None for a model without one.
        **changes: Further keys of the manifest, or others than usual.

    Returns:
        The folder.
    """
    size = {"multiple_of": MULTIPLE, "min": 2 * MULTIPLE, "max": 8192}
    families = ["gaussian"] if "restoration" in graphs else []
    about = {"size": size, "value_range": [*value_range], "prior": prior, "noise_families": families}
    tiles = {"margin": 8, "exact": True}
    parts = [_free_parts(count, value_range, graphs) for count in channels]
    return write_version(folder, parts, {**about, "tiles": tiles, **changes})


def ladder_version(folder: Path, spread: float = 1.0, graphs: Collection[str] = (), **changes: Any) -> Path:
    """Write a hierarchical version of two groups, all of whose distributions are Gaussian and known.

    Images are (1, 4, 6). A pixel of z1, (1, 2, 3), stands above a block of two by two pixels of z2, (1, 4, 6):
    z1 ~ N(0, 1), z2 ~ N(0.8 z1, 0.5), x ~ N(0.9 z2 + 0.5, 0.2). The last numbers are variances. The posterior is
    exact where `spread` is 1; its standard deviations are multiplied by it.

    Args:
        folder: models/<name>/<version>.
        spread: Factor of the standard deviations of the posterior.
        graphs: Its graphs; all of posterior, decoder, prior and log_joint by default.
        **changes: Keys of the manifest.

    Returns:
        The folder.
    """
    groups = [
        {"name": "z1", "shape": [1, 2, 3], "channels": [0, 1], "block": 1},
        {"name": "z2", "shape": [1, 4, 6], "channels": [1, 5], "block": 2},
    ]
    bodies = {name: body for name, body in LADDER.items() if name in (graphs or LADDER)}
    scored = {"scoring": SCORING} if "log_joint" in bodies else {}
    parts = Parts([1, 4, 6], [5, 2, 3], bodies, _ladder_weights(spread), {"groups": groups, **scored})
    return write_version(folder, [parts], {"prior": "hierarchical", **changes})


def conditional_version(
    folder: Path, channels: Sequence[int] = (1, 3), graphs: Collection[str] = (), **changes: Any
) -> Path:
    """Write a conditional version for images of any size, all of whose distributions are Gaussian and known.

    Pixels are independent draws of N(`MIDDLE`, `SPREAD`), the second number a variance. They are seen alone, or, with a
    mask of 1 / k^2, as means of k x k pixels; noise of several families has the sum of their variances. So the graph
    `restoration` is exact. A draw adds `OF_LATENTS` of the posterior's variance, the same in blocks of 8 x 8 pixels.
    Its latents (2, height/8, width/8) are N(mean of the block of y, 1/4). Noise is estimated from differences of
    neighbouring pixels, which is right for white noise on a flat image: `noise` calls 0.8 of it gaussian and 0.6
    processed.

    Args:
        folder: models/<name>/<version>.
        channels: Channels of each variant.
        graphs: Some of restoration, completion, noise_level and noise; all by default.
        **changes: Further keys of the manifest, or others than usual.

    Returns:
        The folder.
    """
    size = {"multiple_of": 8, "min": 16, "max": 8192}
    bodies = {name: body for name, body in CONDITIONAL.items() if name in (graphs or CONDITIONAL)}
    parts = [
        Parts(
            [count, "height", "width"],
            [2, "height/8", "width/8"],
            bodies,
            _conditional_weights(),
            {},
            [4 * count, "height/2", "width/2"],
            (16, 24),
        )
        for count in channels
    ]
    about = {"size": size, "tiles": {"margin": 8, "exact": True}, "noise_families": ["gaussian", "processed"]}
    return write_version(folder, parts, {**about, **changes})


def opened(folder: Path) -> Model:
    """The version, opened and replayed without a process of its own and without warm-up."""
    with open_version(folder) as version:
        return assemble(version, "CPUExecutionProvider", 1)


def write_version(folder: Path, variants: Sequence[Parts], about: Mapping[str, Any]) -> Path:
    """Write a version: graphs, golden rows and manifest.

    Args:
        folder: models/<name>/<version>.
        variants: Its variants, the first one first.
        about: Further keys of the manifest.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    families = len(about.get("noise_families", ()))
    first, *others = (
        _written(folder, parts, families, f"-{parts.input_shape[0]}" if len(variants) > 1 else "") for parts in variants
    )
    names = {"schema_version": 1, "name": folder.parent.name, "version": folder.name}
    content = {**names, **first, **({"variants": others} if others else {}), **about}
    manifest_of(content)
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def _written(folder: Path, parts: Parts, families: int, suffix: str) -> dict[str, Any]:
    """Write the graphs and golden rows of a variant; returns the variant as the manifest has it."""
    free = parts.input_shape[1:] == ["height", "width"]
    size = parts.golden_size if free else at_size(parts.input_shape[1:], 0, 0)
    rng, graphs, golden = np.random.default_rng(SEED), {}, {}
    for name, body in parts.bodies.items():
        inputs, outputs = (_shapes(axes, parts, families) for axes in (GRAPHS[name].inputs, GRAPHS[name].outputs))
        content = _graph(name, body, inputs, outputs, parts.weights)
        entry = {"file": f"{name}{suffix}.onnx", "sha256": digest(content), "inputs": inputs, "outputs": outputs}
        (folder / f"{name}{suffix}.onnx").write_bytes(content)
        given = {key: rng.random((ROWS, *at_size(shape, *size)), np.float32) for key, shape in inputs.items()}
        found = Session(content, "CPUExecutionProvider", 1, Graph.model_validate(entry))(*given.values())
        every = {**given, **dict(zip(outputs, found, strict=True))}
        golden |= {f"{name}/{key}": values for key, values in every.items()}
        graphs[name] = entry
    file = f"golden{suffix}.npz"
    np.savez(folder / file, **golden)
    known = {"file": file, "sha256": digest((folder / file).read_bytes()), "rows": ROWS, "tolerance": 1e-4}
    if free:
        known |= {"height": size[0], "width": size[1]}
    shapes = {"input_shape": parts.input_shape, "latent_shape": parts.latent_shape}
    return {**shapes, "graphs": graphs, "golden": known, **parts.more}


def _shapes(tensors: Mapping[str, str], parts: Parts, families: int) -> Shapes:
    """Shapes of a graph's tensors. The prior's noise has that of a latent."""
    chosen = {NOISE: parts.latent_shape, FEATURES: [*parts.features]}
    return {
        key: chosen[axes] if axes in chosen else shape_of(axes, parts.input_shape, parts.latent_shape, families) or []
        for key, axes in tensors.items()
    }


def _graph(name: str, body: str, inputs: Shapes, outputs: Shapes, weights: Mapping[str, Any]) -> bytes:
    """A graph as an ONNX file, checked."""

    def declared(shapes: Shapes) -> str:
        axes = {key: [str(axis).replace("/", "_by_") for axis in shape] for key, shape in shapes.items()}
        return ", ".join(f"float[{', '.join(['n', *of])}] {key}" for key, of in axes.items())

    model = onnx.parser.parse_model(f"{HEAD} {name} ({declared(inputs)}) => ({declared(outputs)}) {{ {body} }}")
    taken = {tensor for node in model.graph.node for tensor in node.input}
    for key, values in weights.items():
        if key in taken:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), key))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


SCORING = {
    "binary": False,
    "binarisation": "none",
    "elbo_percentiles_nats": [float(k) for k in range(-100, 1)],
    "images": 101,
    "draws": 16,
    "seed": 0,
}

# A fully convolutional version, written for images in [0, 1].

HALF, RESTORING = 2, ("recognition", "noise_level", "fusion", "correction")
ENCODER = """
    wide = Conv <pads = [1, 1, 1, 1]> (light, widen)
    bent = Tanh (wide)
    both = Conv <strides = [4, 4]> (bent, narrow)
    mean, log_var = Split <axis = 1, num_outputs = 2> (both)
"""
DECODER = """
    raised = ConvTranspose <strides = [4, 4]> (z, raise)
    rough = Tanh (raised)
    flat = Conv <pads = [1, 1, 1, 1]> (rough, flatten)
    shown = Sigmoid (flat)
"""
FREE = {
    "encoder": f"light = TO_LIGHT (x) {ENCODER}",
    "decoder": f"{DECODER} x_mean = FROM_LIGHT (shown)",
    "log_joint": f"""
        {DECODER}
        light = TO_LIGHT (x)
        off = Sub (light, shown)
        square = Mul (off, off)
        of_x = ReduceSum <keepdims = 0> (square, pixels)
        log_likelihood = Neg (of_x)
        length = Mul (z, z)
        of_z = ReduceSum <keepdims = 0> (length, pixels)
        log_prior = Neg (of_z)
    """,
    "recognition": f"light = Mul (y, mask) {ENCODER}",
    "noise_level": """
        seen = Mul (y, mask)
        square = Mul (seen, seen)
        mean = ReduceMean <keepdims = 0> (square, pixels)
        level = Unsqueeze (mean, last)
    """,
    "fusion": """
        apart = Sub (y, x_mean)
        share = Mul (mask, half)
        step = Mul (share, apart)
        restored = Add (x_mean, step)
        high = Unsqueeze (level, planes)
        nothing = Mul (y, zero)
        known = Add (nothing, high)
        variance = Add (known, little)
    """,
    "correction": "restored = Identity (fused) variance = Identity (fused_variance)",
}


def _free_parts(channels: int, value_range: tuple[float, float], graphs: Collection[str]) -> Parts:
    names = {*graphs, *(RESTORING if "restoration" in graphs else ())}
    rng = np.random.default_rng(channels)

    def normal(*shape: int) -> Rows:
        found: Rows = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        return found

    low, high = value_range
    weights = {
        "widen": normal(4, channels, 3, 3),
        "narrow": 4.0 * normal(2 * HALF, 4, 4, 4),
        "raise": 4.0 * normal(HALF, 4, 4, 4),
        "flatten": 4.0 * normal(channels, 4, 3, 3),
        "width": np.float32(high - low),
        "low": np.float32(low),
        "half": np.float32(0.5),
        "zero": np.float32(0.0),
        "little": np.float32(0.01),
        "pixels": np.int64([1, 2, 3]),
        "planes": np.int64([2, 3]),
        "last": np.int64([1]),
    }
    bodies = {
        name: body.replace("light = TO_LIGHT (x)", "above = Sub (x, low) light = Div (above, width)").replace(
            "x_mean = FROM_LIGHT (shown)", "broad = Mul (shown, width) x_mean = Add (broad, low)"
        )
        for name, body in FREE.items()
        if name in names
    }
    shapes: tuple[list[Axis], list[Axis]] = [channels, "height", "width"], [HALF, "height/4", "width/4"]
    return Parts(*shapes, bodies, weights, {"scoring": SCORING} if "log_joint" in names else {})


# A hierarchical version. All is per block of two by two pixels, so its graphs work in the packed space.

FACTOR, OFFSET, SLOPE = 0.8, 0.5, 0.9
VARIANCE_Z2, VARIANCE_X = 0.5, 0.2
PACKED = "flat = SpaceToDepth <blocksize = 2> (x) block = Sub (flat, offset)"
LADDER = {
    "posterior": f"""
        {PACKED}
        eps1, eps2 = Split <axis = 1> (eps, one_four)
        total = ReduceSum <keepdims = 1> (block, channel)
        mean1 = Mul (total, gain1)
        noise1 = Mul (eps1, std1)
        z1 = Add (mean1, noise1)
        by_x = Mul (block, gain_x)
        by_z1 = Mul (z1, gain_z1)
        mean2 = Add (by_x, by_z1)
        noise2 = Mul (eps2, std2)
        z2 = Add (mean2, noise2)
        z = Concat <axis = 1> (z1, z2)
        mean = Concat <axis = 1> (mean1, mean2)
        empty = Mul (mean, zero)
        log_var = Add (empty, log_vars)
        square = Mul (eps, eps)
        part = Add (square, log_vars)
        whole = Add (part, log_two_pi)
        sum = ReduceSum <keepdims = 0> (whole, pixels)
        log_q = Mul (sum, minus_half)
    """,
    "decoder": """
        z1, z2 = Split <axis = 1> (z, one_four)
        scaled = Mul (z2, slope)
        moved = Add (scaled, offset)
        x_mean = DepthToSpace <blocksize = 2> (moved)
    """,
    "prior": """
        z1, eps2 = Split <axis = 1> (eps, one_four)
        noise2 = Mul (eps2, prior_std2)
        mean2 = Mul (z1, factor)
        z2 = Add (mean2, noise2)
        z = Concat <axis = 1> (z1, z2)
    """,
    "log_joint": f"""
        {PACKED}
        z1, z2 = Split <axis = 1> (z, one_four)
        expected = Mul (z2, slope)
        off_x = Sub (block, expected)
        square_x = Mul (off_x, off_x)
        share_x = Div (square_x, variance_x)
        nats_x = Add (share_x, constant_x)
        sum_x = ReduceSum <keepdims = 0> (nats_x, pixels)
        log_likelihood = Mul (sum_x, minus_half)
        mean2 = Mul (z1, factor)
        off2 = Sub (z2, mean2)
        square2 = Mul (off2, off2)
        share2 = Div (square2, variance2)
        nats2 = Add (share2, constant2)
        sum2 = ReduceSum <keepdims = 0> (nats2, pixels)
        square1 = Mul (z1, z1)
        nats1 = Add (square1, log_two_pi)
        sum1 = ReduceSum <keepdims = 0> (nats1, pixels)
        sum_z = Add (sum1, sum2)
        log_prior = Mul (sum_z, minus_half)
    """,
}


def _ladder_weights(spread: float) -> dict[str, Any]:
    """Constants of the graphs, the posterior's by Bayes' rule for Gaussians."""
    of_block = 4.0 * (FACTOR * SLOPE) ** 2 / (SLOPE**2 * VARIANCE_Z2 + VARIANCE_X)
    precision1 = 1.0 + of_block
    precision2 = 1.0 / VARIANCE_Z2 + SLOPE**2 / VARIANCE_X
    std1, std2 = spread / np.sqrt(precision1), spread / np.sqrt(precision2)
    log_vars = 2.0 * np.log([std1, std2, std2, std2, std2]).reshape(5, 1, 1)
    log_two_pi = np.log(2.0 * np.pi)
    floats = {
        "gain1": FACTOR * SLOPE / (SLOPE**2 * VARIANCE_Z2 + VARIANCE_X) / precision1,
        "gain_x": SLOPE / VARIANCE_X / precision2,
        "gain_z1": FACTOR / VARIANCE_Z2 / precision2,
        "std1": std1,
        "std2": std2,
        "log_vars": log_vars,
        "log_two_pi": log_two_pi,
        "constant_x": log_two_pi + np.log(VARIANCE_X),
        "constant2": log_two_pi + np.log(VARIANCE_Z2),
        "variance_x": VARIANCE_X,
        "variance2": VARIANCE_Z2,
        "prior_std2": np.sqrt(VARIANCE_Z2),
        "factor": FACTOR,
        "slope": SLOPE,
        "offset": OFFSET,
        "zero": 0.0,
        "minus_half": -0.5,
    }
    whole = {"one_four": [1, 4], "channel": [1], "pixels": [1, 2, 3]}
    return {
        **{key: np.asarray(value, np.float32) for key, value in floats.items()},
        **{key: np.asarray(value, np.int64) for key, value in whole.items()},
    }


# A conditional version. `level` holds standard deviations, whose squares add up.

MIDDLE, SPREAD, OF_LATENTS = 0.5, 0.04, 0.36
DIFFERENCES = """
    before = Slice (y, from_first, to_last, width)
    after = Slice (y, from_second, to_end, width)
    step = Sub (after, before)
    steps = Mul (step, step)
    mean_step = ReduceMean <keepdims = 0> (steps, pixels)
    half_step = Mul (mean_step, half)
    deviation = Sqrt (half_step)
    column = Unsqueeze (deviation, last)
"""
CONDITIONAL = {
    "restoration": """
        square = Mul (level, level)
        total = ReduceSum <keepdims = 1> (square, last)
        high = Unsqueeze (total, planes)
        noise = Add (high, tiny)
        prior = Mul (mask, spread)
        both = Add (prior, noise)
        gain = Div (prior, both)
        off = Sub (y, middle)
        pull = Mul (gain, off)
        restored = Add (pull, middle)
        share = Mul (mask, gain)
        left = Sub (one, share)
        variance = Mul (left, spread)
        features = SpaceToDepth <blocksize = 2> (restored)
    """,
    "completion": """
        square = Mul (level, level)
        total = ReduceSum <keepdims = 1> (square, last)
        high = Unsqueeze (total, planes)
        noise = Add (high, tiny)
        prior = Mul (mask, spread)
        both = Add (prior, noise)
        gain = Div (prior, both)
        share = Mul (mask, gain)
        left = Sub (one, share)
        whole = Mul (left, spread)
        variance = Mul (whole, of_noise)
        of_z = Mul (whole, of_latents)
        deviation = Sqrt (of_z)
        grey = ReduceMean <keepdims = 1> (y, last)
        block = AveragePool <kernel_shape = [8, 8], strides = [8, 8]> (grey)
        mean = Concat <axis = 1> (block, block)
        scaled = Mul (eps, half)
        z = Add (mean, scaled)
        nothing = Mul (eps, zero)
        log_var = Add (nothing, log_quarter)
        sum = ReduceSum <keepdims = 1> (eps, last)
        unit = Mul (sum, of_two)
        large = Resize <mode = "nearest"> (unit, , eightfold)
        moved = Mul (deviation, large)
        kept = DepthToSpace <blocksize = 2> (features)
        completion = Add (kept, moved)
        squares = Mul (eps, eps)
        part = Add (squares, log_quarter)
        nats = Add (part, log_two_pi)
        sum_nats = ReduceSum <keepdims = 0> (nats, pixels)
        log_p = Mul (sum_nats, minus_half)
    """,
    "noise_level": f"{DIFFERENCES} level = Concat <axis = 1> (column, column)",
    "noise": f"{DIFFERENCES} level = Mul (column, shares)",
}


def _conditional_weights() -> dict[str, Any]:
    """Constants of its graphs."""
    floats = {
        "tiny": 1e-9,
        "spread": SPREAD,
        "middle": MIDDLE,
        "one": 1.0,
        "zero": 0.0,
        "half": 0.5,
        "minus_half": -0.5,
        "of_latents": OF_LATENTS,
        "of_noise": 1.0 - OF_LATENTS,
        "of_two": np.sqrt(0.5),
        "log_quarter": np.log(0.25),
        "log_two_pi": np.log(2.0 * np.pi),
        "eightfold": [1.0, 1.0, 8.0, 8.0],
        "shares": [[0.8, 0.6]],
    }
    whole = {
        "last": [1],
        "planes": [2, 3],
        "pixels": [1, 2, 3],
        "width": [3],
        "from_first": [0],
        "to_last": [-1],
        "from_second": [1],
        "to_end": [2**31 - 1],
    }
    return {
        **{key: np.asarray(value, np.float32) for key, value in floats.items()},
        **{key: np.asarray(value, np.int64) for key, value in whole.items()},
    }
