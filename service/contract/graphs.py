"""Graphs of a model version: what each computes, and its tensors by name with their axes.

The exporter names tensors and free axes by `GRAPHS`, the loader compares a manifest with it, and the service gives and
takes the tensors of a graph in its order. A graph of another name may be exported too; the service replays it alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Axis = int | str
"""A length, or `height`, `width` or a whole fraction of one of them, such as `height/8`."""
IMAGE = "channels height width"
SEEN = "channels seen_height seen_width"
"""Axes of an image seen through an operator, which may shrink it."""
LATENT = "*latent"
"""Axes of a latent, of which there may be any number."""
VECTOR = "latent"
"""The axis of a latent that must be a vector."""
LEVEL = "families"
"""One number a noise family."""
VECTOR_AND_LEVEL = "latent+families"
"""One axis: the latent's numbers, then one a noise family."""
NOISE = "*noise"
"""Axes that the graph chooses."""
FEATURES = "*features"
"""Axes that the graph `restoration` chooses, and `completion` takes."""
NUMBER = ""
"""No axes: one number a row."""
FREE = ("seen_height", "seen_width")
"""Axes whose length each call may choose. Golden rows have those of a whole image."""
VECTORS = (VECTOR, VECTOR_AND_LEVEL)


class Signature(NamedTuple):
    """What a graph computes, and its tensors: axes by name, after the batch axis, separated by spaces.

    Attributes:
        about: The computation in a few words.
        inputs: Axes of each input by its name, in the order in which the service gives them.
        outputs: Axes of each output by its name, in the order in which the service takes them.
        needs: Graphs that a version with this one must have too.
        excludes: Graphs that a version with this one must not have.
    """

    about: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    needs: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()


_OBSERVED = {"y": IMAGE, "mask": IMAGE, "level": LEVEL}
_RESTORED = {"restored": IMAGE, "variance": IMAGE}
_RESTORING = ("decoder", "recognition", "noise_level", "fusion", "correction")

GRAPHS = {
    "encoder": Signature("q(z|x): its mean and log variance", {"x": IMAGE}, {"mean": LATENT, "log_var": LATENT}),
    "decoder": Signature("E[x|z]", {"z": LATENT}, {"x_mean": IMAGE}),
    "posterior": Signature(
        "a draw z of a hierarchical q(z|x) from standard normal noise, mean and log variance of each latent given "
        "those above it, and log q(z|x) in nats",
        {"x": IMAGE, "eps": LATENT},
        {"z": LATENT, "mean": LATENT, "log_var": LATENT, "log_q": NUMBER},
    ),
    "prior": Signature("a draw z of the prior from standard normal noise", {"eps": NOISE}, {"z": LATENT}),
    "log_joint": Signature(
        "log p(x|z) and log p(z) in nats",
        {"x": IMAGE, "z": LATENT},
        {"log_likelihood": NUMBER, "log_prior": NUMBER},
    ),
    "elbo_gradient": Signature(
        "the ELBO of one draw under q(z), in nats, and its gradient in q's parameters",
        {"q_mean": VECTOR, "q_log_var": VECTOR, "eps": VECTOR, "x": IMAGE},
        {"elbo": NUMBER, "q_mean_gradient": VECTOR, "q_log_var_gradient": VECTOR},
    ),
    "recognition": Signature(
        "q(z|y, mask, level) of a corrupted image: its mean and log variance",
        _OBSERVED,
        {"mean": LATENT, "log_var": LATENT},
        needs=_RESTORING,
    ),
    "noise_level": Signature(
        "the level of each noise family, as if it were the one at work",
        {"y": IMAGE, "mask": IMAGE},
        {"level": LEVEL},
    ),
    "fusion": Signature("E[x|y, z] and its variance, each pixel for itself", {"x_mean": IMAGE, **_OBSERVED}, _RESTORED),
    "correction": Signature(
        "E[x|y] and its variance, from what the fusion gives",
        {"fused": IMAGE, "fused_variance": IMAGE, **_OBSERVED},
        _RESTORED,
    ),
    "refinement": Signature(
        "a bound on log p(y) of one draw under q(z, level), in nats, the level drawn, and the bound's gradient in q's "
        "parameters",
        {
            "q_mean": VECTOR_AND_LEVEL,
            "q_log_var": VECTOR_AND_LEVEL,
            "eps": VECTOR_AND_LEVEL,
            "y": SEEN,
            "mask": SEEN,
            "level": LEVEL,
            "unknown": LEVEL,
            "rows": "seen_height height",
            "columns": "seen_width width",
        },
        {
            "elbo": NUMBER,
            "drawn": LEVEL,
            "q_mean_gradient": VECTOR_AND_LEVEL,
            "q_log_var_gradient": VECTOR_AND_LEVEL,
        },
        needs=_RESTORING,
    ),
    "restoration": Signature(
        "E[x|y, mask, level] of a corrupted image, its variance, and features for `completion`",
        _OBSERVED,
        {**_RESTORED, "features": FEATURES},
        excludes=("recognition",),
    ),
    "completion": Signature(
        "one draw of x given y, from standard normal noise: the mean of x given y and z, and its variance; z, mean and "
        "log variance of each latent of p(z|y, mask, level) given those above it, and log p(z|y, mask, level) in nats",
        {**_OBSERVED, "restored": IMAGE, "features": FEATURES, "eps": LATENT},
        {
            "completion": IMAGE,
            "variance": IMAGE,
            "z": LATENT,
            "mean": LATENT,
            "log_var": LATENT,
            "log_p": NUMBER,
        },
        needs=("restoration",),
    ),
    "noise": Signature(
        "the levels of all noise families at work, estimated jointly",
        {"y": IMAGE, "mask": IMAGE},
        {"level": LEVEL},
    ),
}
"""Signatures of the graphs that the service runs, by name."""

RANGED = {"encoder": ("x",), "posterior": ("x",), "decoder": ("x_mean",), "log_joint": ("x",)}
"""Tensors whose values lie in the manifest's `value_range`, by graph. All other images lie in [0, 1]."""


def fraction_of(axis: str) -> tuple[str, int] | None:
    """The axis `height` or `width` that a text names, and its divisor; None for another text."""
    found = re.fullmatch(r"(height|width)(?:/([1-9]\d{0,4}))?", axis)
    return None if found is None else (found[1], int(found[2] or 1))


def at_size(shape: Sequence[Axis], height: int, width: int) -> tuple[int, ...]:
    """The shape for images of this height and width.

    Raises:
        ValueError: An axis divides height or width with a remainder.
    """
    found = []
    for axis in shape:
        known = fraction_of(axis) if isinstance(axis, str) else None
        if known is None:
            found.append(int(axis))
            continue
        length, rest = divmod(height if known[0] == "height" else width, known[1])
        if rest or not length:
            raise ValueError(f"{axis} is no whole number at {height} x {width}")
        found.append(length)
    return tuple(found)


def shape_of(axes: str, input_shape: Sequence[Axis], latent_shape: Sequence[Axis], families: int) -> list[Axis] | None:
    """The shape after the batch axis of a tensor with these axes.

    Args:
        axes: As a `Signature` has them.
        input_shape: (c, h, w) of the model's images; height and width may be free.
        latent_shape: Shape of one latent.
        families: Number of noise families.

    Returns:
        The shape, or None where the graph chooses it, or where a latent that must be a vector is none.
    """
    channels, height, width = input_shape
    sizes: dict[str, Sequence[Axis]] = {
        "channels": [channels],
        "height": [height],
        "seen_height": [height],
        "width": [width],
        "seen_width": [width],
        LATENT: latent_shape,
        LEVEL: [families],
    }
    if len(latent_shape) == 1 and isinstance(latent_shape[0], int):
        sizes |= {VECTOR: latent_shape, VECTOR_AND_LEVEL: [latent_shape[0] + families]}
    names = axes.split()
    return [size for name in names for size in sizes[name]] if sizes.keys() >= set(names) else None


def free_axes(tensors: Mapping[str, str]) -> dict[str, dict[int, str]]:
    """Axes of tensors whose length each call may choose: name by place (the batch axis is 0), by tensor."""
    found = {
        tensor: {place: axis for place, axis in enumerate(axes.split(), 1) if axis in FREE}
        for tensor, axes in tensors.items()
    }
    return {tensor: axes for tensor, axes in found.items() if axes}
