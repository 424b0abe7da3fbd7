"""What operations need of a model, and the refusal of a model that lacks it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from service.errors import UnsupportedOperation
from service.runtime.model import NOISE, ONE_GROUP, PRIOR, Model

Need = str | tuple[str, ...]
"""A graph, `PRIOR`, `ONE_GROUP` or a family of noise; or alternatives, of which one is enough."""
ENCODING = ("encoder", "posterior")
"""Graphs of q(z|x)."""
RESTORING: Need = ("recognition", "restoration")
"""Graphs that restore images, in one of two ways; manifests with one of them have all that go with it."""
REFINING: Need = ("refinement", "restoration")
"""Graphs that `quality=refined` of restoration needs."""

REASONS: dict[Need, str] = {
    ENCODING: "it has no encoder",
    (*ENCODING, "completion"): "it has no encoder",
    "encoder": "its q(z|x) is not one diagonal Gaussian",
    "decoder": "it has no decoder",
    "log_joint": "it does not give log p(x, z), which the graph log_joint computes",
    "elbo_gradient": "it does not give the gradient of the ELBO, which the graph elbo_gradient computes",
    RESTORING: "it was not trained to restore corrupted images",
    REFINING: "it does not give the gradient of the bound on log p(y), which the graph refinement computes",
    PRIOR: "it has no prior p(z), because its latents were never fitted to one",
    ONE_GROUP: "its latents are groups that depend on each other, and points between two latents do not keep that",
}
"""Why a model cannot do something, by the first need that it does not meet."""
CONDITIONAL = "it is a model of images given a corrupted one, p(x|y), and has no p(x)"
"""Why a conditional model lacks all graphs of images alone."""
MOST_NAMED = 5
"""Models that a message names."""


def lacking(model: Model, needs: Iterable[Need]) -> Need | None:
    """The first need that a model does not meet; None if it meets all."""
    abilities = model.abilities
    for need in needs:
        if need not in abilities if isinstance(need, str) else abilities.isdisjoint(need):
            return need
    return None


def check_able(
    model: Model, needs: tuple[Need, ...], doing: str, served: Mapping[str, dict[str, Model]], advice: str = ""
) -> None:
    """Refuse a model that does not meet all needs.

    Args:
        model: The model.
        needs: What it needs.
        doing: What it is asked to do, after "cannot".
        served: Served models by name and version, some of which may be able to.
        advice: What else works.

    Raises:
        UnsupportedOperation: The message names the reason, and the models whose latest version is able to.
    """
    need = lacking(model, needs)
    if need is None:
        return
    able = [name for name, versions in served.items() if lacking(next(reversed(versions.values())), needs) is None]
    others = f"served models that can: {', '.join(able[:MOST_NAMED])}" if able else "no served model can"
    raise UnsupportedOperation(f"model {model.manifest.name} cannot {doing}: {_reason(model, need)}; {others}{advice}")


def _reason(model: Model, need: Need) -> str:
    """Why a model that does not meet a need cannot do what needs it."""
    if isinstance(need, str) and need.endswith(f" {NOISE}"):
        return f"it was trained on noise of the kinds {', '.join(model.manifest.noise_families)} and none"
    if "restoration" in model.abilities and "decoder" not in model.abilities:
        return CONDITIONAL
    return REASONS.get(need, f"its version has no graph {need if isinstance(need, str) else ' or '.join(need)}")
