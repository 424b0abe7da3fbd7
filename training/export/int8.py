"""Graphs in int8: static quantisation, its gain in speed, and its loss on held-out rows."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from service.contract.corruption import FAMILIES
from service.contract.golden import deviation
from service.contract.graphs import at_size
from service.contract.images import Pixels
from service.contract.manifest import Manifest
from training.data import binarise
from training.errors import ExportError
from training.evaluation.measures import psnr
from training.export.weights import without_float16
from training.loop.randomness import keyed_generator
from training.models.restoration import simulate

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in service/runtime/session.py
import onnxruntime as ort  # after the line above

Rows = dict[str, NDArray[np.float32]]
"""Arrays (n, ...) by tensor."""
RunGraph = Callable[[str, Rows], Rows]
"""Runs a graph, by name, on its inputs."""

OPERATORS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]
KEPT = ((1, 2), (1, 1), (0, 0))
"""How many of the first and of the last operators stay in float32, the most accurate choice first."""
ROWS = 16
"""Rows of a batch, as a busy service forms them."""
SPEED_S = 1.5
"""CPU time over which a speed is measured."""
FEWEST_RUNS = 10
MOST_RUNS = 100


class Gain(NamedTuple):
    """How many times as fast a graph is: quartiles over interleaved runs of both."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def run_in_batches(session: ort.InferenceSession, rows: Rows) -> Rows:
    """Run a graph on any number of rows."""
    names = [output.name for output in session.get_outputs()]
    count = len(next(iter(rows.values())))
    parts = [
        session.run(names, {key: array[k : k + ROWS] for key, array in rows.items()}) for k in range(0, count, ROWS)
    ]
    return {name: np.concatenate(arrays) for name, arrays in zip(names, zip(*parts, strict=True), strict=True)}


def rows_of(manifest: Manifest, run: RunGraph, x: Pixels, seed: int) -> dict[str, Rows]:
    """Inputs of the graphs that may be quantised, as a request with these images would lead to them.

    Gradients and log densities need more digits, and a prior must stay the one that is scored.

    Args:
        manifest: The version's.
        run: Runs its graphs.
        x: Images (n, c, h, w) in [0, 1].
        seed: Seed of posterior draws, binarisation and corruptions.

    Raises:
        ExportError: The version has neither an encoder nor a posterior.
    """
    generator = keyed_generator(torch.device("cpu"), seed, 13)
    low, high = (np.float32(end) for end in manifest.value_range)
    images = low + (high - low) * _as_scored(manifest, x, generator, every=2)
    eps = torch.randn(len(x), *at_size(manifest.latent_shape, *x.shape[2:]), generator=generator).numpy()
    found: dict[str, Rows] = {}
    if "encoder" in manifest.graphs:
        found["encoder"] = {"x": images}
        q = run("encoder", found["encoder"])
        found["decoder"] = {"z": q["mean"] + np.exp(q["log_var"] / 2) * eps}
    elif "posterior" in manifest.graphs:
        found["posterior"] = {"x": images, "eps": eps}
        found["decoder"] = {"z": run("posterior", found["posterior"])["z"]}
    else:
        raise ExportError(f"{manifest.name} has no encoder, whose latents the decoder would be measured on")
    if "recognition" in manifest.graphs and manifest.noise_families == list(FAMILIES):
        corrupted = simulate(torch.from_numpy(x), generator)
        seen = {key: tensor.numpy() for key, tensor in corrupted._asdict().items()}
        x_mean = run("decoder", {"z": run("recognition", seen)["mean"]})["x_mean"]
        fused = run("fusion", {"x_mean": (x_mean - low) / (high - low), **seen})
        found["recognition"] = seen
        found["noise_level"] = {"y": seen["y"], "mask": seen["mask"]}
        found["correction"] = {"fused": fused["restored"], "fused_variance": fused["variance"], **seen}
    return {name: rows for name, rows in found.items() if name in manifest.graphs}


def _as_scored(manifest: Manifest, x: Pixels, generator: torch.Generator, every: int = 1) -> Pixels:
    """The images, every so many of them binarised where the model scores binary ones."""
    if manifest.scoring is None or manifest.scoring.binarisation == "none":
        return x
    binary = binarise((torch.from_numpy(x) * 255.0).round().to(torch.uint8), generator).numpy()
    return np.where((np.arange(len(x)) % every == 0)[:, None, None, None], binary, x)


def quantised(graph: Path, rows: Rows, kept: tuple[int, int] = (0, 0)) -> bytes:
    """Quantise the convolutions and matrix products of a graph: weights per channel, activations by their range.

    Activations are unsigned, which processors multiply fastest with signed weights. Weights have seven bits, because
    processors without VNNI add two products in 16 bits.

    Args:
        graph: File of the graph.
        rows: Its inputs, which give the activations' ranges.
        kept: How many of the first and of the last operators stay in float32.

    Returns:
        The graph in plain ONNX, with QuantizeLinear and DequantizeLinear (QDQ).

    Source: Jacob et al. (2018), "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", section 2.
    """
    from onnxruntime import quantization  # noqa: PLC0415  # slow to import, and most commands quantise nothing

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        """The rows, batch by batch."""

        def __init__(self) -> None:
            count = len(next(iter(rows.values())))
            self.batches = iter([{key: array[k : k + ROWS] for key, array in rows.items()}
                                 for k in range(0, count, ROWS)])  # fmt: skip

        def get_next(self) -> Rows | None:
            return next(self.batches, None)

    model = _float32(graph)
    operators, (first, last) = _operators(model), kept
    inner = operators[first : len(operators) - last]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        given, made = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, given)
        quantization.quantize_static(
            given, made, Reader(), quant_format=quantization.QuantFormat.QDQ, op_types_to_quantize=OPERATORS,
            nodes_to_exclude=[name for name in operators if name not in inner], per_channel=True, reduce_range=True,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
        return made.read_bytes()


def choices(graph: Path) -> list[tuple[int, int]]:
    """Those of `KEPT` that leave an operator of the graph to quantise, the most accurate first."""
    count = len(_operators(_float32(graph)))
    return [kept for kept in KEPT if sum(kept) < count]


def _float32(graph: Path) -> onnx.ModelProto:
    """The graph with weights in float32, each node with a name."""
    model = onnx.load(graph)
    without_float16(model)
    for place, node in enumerate(model.graph.node):
        node.name = node.name or f"node {place}"
    return model


def _operators(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type in OPERATORS]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice on preparing graphs, which goes to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def gain(before: ort.InferenceSession, after: ort.InferenceSession, rows: Rows) -> Gain:
    """Measure how many times as fast a graph has become, in CPU time, which other processes do not lengthen.

    Args:
        before: The graph with one thread.
        after: The other graph likewise.
        rows: One batch of inputs.
    """
    ratios: list[float] = []
    spent = 0.0
    for session in (before, after):
        session.run(None, rows)
    while len(ratios) < FEWEST_RUNS or (spent < SPEED_S and len(ratios) < MOST_RUNS):
        times = [_seconds(session, rows) for session in (before, after)]
        ratios.append(times[0] / times[1])
        spent += sum(times)
    return Gain(*(float(value) for value in np.percentile(ratios, (25, 50, 75))))


def _seconds(session: ort.InferenceSession, rows: Rows) -> float:
    start = time.thread_time_ns()
    session.run(None, rows)
    return max(time.thread_time_ns() - start, 1) * 1e-9


def loss(before: Rows, after: Rows, value_range: list[float]) -> dict[str, float]:
    """How far the outputs of a graph have moved.

    Args:
        before: Outputs by name, (n, ...) each.
        after: Those of the quantised graph.
        value_range: Black and white of images among them.

    Returns:
        Figures by name: of posteriors KL(before || after) in nats, and the root mean square difference of the means in
        posterior standard deviations; of images the mean PSNR in dB; else the largest difference.
    """
    if "log_var" in before:
        (mean, log_var), (other, other_log_var) = ((one["mean"], one["log_var"]) for one in (before, after))
        square = np.exp(log_var - other_log_var) + np.square(mean - other) * np.exp(-other_log_var)
        kl = 0.5 * (square - 1.0 + other_log_var - log_var).reshape(len(mean), -1).sum(1)
        moved = np.square(mean - other) * np.exp(-log_var)
        return {"kl_nats": float(kl.mean()), "mean_moved_std": float(np.sqrt(moved.mean()))}
    image = next((name for name in ("x_mean", "restored") if name in before), None)
    if image is None:
        return {"largest_difference": max(deviation(name, after[name], known) for name, known in before.items())}
    low, high = value_range if image == "x_mean" else (0.0, 1.0)
    pair = [(one[image] - low) / (high - low) for one in (after, before)]
    return {"psnr_db": float(psnr(pair[0], pair[1]).mean())}


def elbo(manifest: Manifest, run: RunGraph, x: Pixels, draws: int, seed: int) -> NDArray[Any]:
    """The ELBO of images as the service's `score` estimates it, in nats, (n,).

    Args:
        manifest: Of a version with the graph `log_joint`.
        run: Runs its graphs.
        x: Images (n, c, h, w) in [0, 1].
        draws: Draws of the posterior for each image.
        seed: Seed of binarisation and draws; equal seeds give equal noise.
    """
    generator = keyed_generator(torch.device("cpu"), seed, 14)
    low, high = (np.float32(end) for end in manifest.value_range)
    images = low + (high - low) * _as_scored(manifest, x, generator)
    latent, total = at_size(manifest.latent_shape, *x.shape[2:]), np.zeros(len(x))
    q = run("encoder", {"x": images}) if "encoder" in manifest.graphs else {}
    for _ in range(draws):
        eps = torch.randn(len(x), *latent, generator=generator).numpy()
        if q:
            z = q["mean"] + np.exp(q["log_var"] / 2) * eps
            log_q = -0.5 * (q["log_var"] + np.log(2 * np.pi) + 1.0).reshape(len(x), -1).sum(1)  # its mean over draws
        else:
            drawn = run("posterior", {"x": images, "eps": eps})
            z, log_q = drawn["z"], drawn["log_q"]
        joint = run("log_joint", {"x": images, "z": z})
        total += joint["log_likelihood"] + joint["log_prior"] - log_q
    return total / draws
