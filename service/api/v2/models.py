"""What the Open Inference Protocol says of models: names, metadata, configuration, index and statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from service.errors import UnknownModel, quoted
from service.operations.operation import PIXELS, Operation, Tensor
from service.repository.repository import Condition, Repository
from service.runtime.model import Model

PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
DATATYPES = {"float32": "FP32", "int64": "INT64", "string": "BYTES"}
CONFIG_TYPES = {**{name: f"TYPE_{name}" for name in ("FP32", "INT64")}, "BYTES": "TYPE_STRING"}
STATES = {"ready": "READY", "loading": "LOADING", "unloaded": "UNAVAILABLE", "failed": "UNAVAILABLE"}
FREE = -1
"""An axis of any length."""
NS = 1e9


def named(model: str, operation: Operation) -> str:
    """The name of an operation of a model."""
    return f"{model}.{operation.name}"


def parted(name: str, operations: Mapping[str, Operation], known: Iterable[str]) -> tuple[str, Operation]:
    """Model and operation of a name, which the last dot parts.

    Args:
        name: The name, from the client.
        operations: The operations by name.
        known: Names of models.

    Raises:
        UnknownModel: It names no operation; the message says how names are made.
    """
    model, _, operation = name.rpartition(".")
    if model and operation in operations:
        return model, operations[operation]
    like = f"MODEL.OPERATION, such as {name if name in known else 'mnist'}.{next(iter(operations))}"
    what = f"{name} is a whole model" if name in known else f"no model {quoted(name)}"
    raise UnknownModel(f"{what}; names here are {like}, and POST /v2/repository/index lists them")


def metadata(model: Model, operation: Operation, versions: Iterable[str]) -> dict[str, Any]:
    """Name, versions, inputs and outputs of an operation of a model."""
    return {
        "name": named(model.manifest.name, operation),
        "versions": [*versions],
        "platform": PLATFORM,
        "inputs": [_described(one, _axes(one, model, operation, sent=True)) for one in operation.inputs],
        "outputs": [
            _described(one, _axes(one, model, operation, sent=False)) for one in operation.outputs if one.shape
        ],
    }


def config(model: Model, operation: Operation, max_rows: int) -> dict[str, Any]:
    """The same as Triton's configuration of a model.

    Args:
        model: The model.
        operation: The operation.
        max_rows: Most rows of a request.
    """
    batched = operation.row_wise and bool(operation.inputs)
    told = metadata(model, operation, ())
    optional = {one.name for one in operation.inputs if not (one.required or (one.name == "mask" and operation.masked))}
    return {
        "name": told["name"],
        "platform": PLATFORM,
        "backend": BACKEND,
        "max_batch_size": max_rows if batched else 0,
        "input": [
            {**_configured(one, batched), **({"optional": True} if one["name"] in optional else {})}
            for one in told["inputs"]
        ],
        "output": [_configured(one, batched) for one in told["outputs"]],
        **({"dynamic_batching": {}} if batched else {}),
    }


def index(repository: Repository, operations: Iterable[Operation], *, ready: bool) -> Iterator[dict[str, str]]:
    """Versions of whole models, each followed by the operations that it offers while it is served.

    Args:
        repository: The models of this worker.
        operations: All operations.
        ready: Whether to leave out versions that are not served.
    """
    for name, versions in repository.conditions.items():
        for version, known in versions.items():
            model = repository.models.get(name, {}).get(version)
            if ready and model is None:
                continue
            yield _indexed(name, version, known)
            if model is not None:
                offered = [one for one in operations if offers(model, one)]
                yield from (_indexed(named(name, one), version, Condition("ready")) for one in offered)


def statistics(totals: Mapping[tuple[str, str, str, str], float], model: Model, operation: Operation) -> dict[str, Any]:
    """Counts of an operation of a model, of all its versions together, since the service began.

    Executions are batches of the program of that name; requests where it runs others.

    Args:
        totals: As `Telemetry.totals` gives them.
        model: The model.
        operation: The operation.
    """
    key = model.manifest.name, operation.name

    def total(name: str, outcome: str = "") -> float:
        return totals.get((name, *key, outcome), 0.0)

    outcomes = {outcome for name, *of, outcome in totals if (name, *of) == ("vae_requests_total", *key)}
    failed = sum(total("vae_requests_total", outcome) for outcome in outcomes - {"ok"})
    done = int(total("vae_requests_total", "ok"))
    queue_ns, infer_ns = (int(NS * total(f"vae_request_{what}_seconds_total")) for what in ("queue", "inference"))
    instant, nothing = {"count": done, "ns": 0}, {"count": 0, "ns": 0}
    return {
        "name": named(*key[:1], operation),
        "version": model.manifest.version,
        "inference_count": int(total("vae_rows_total", "ok")),
        "execution_count": int(total("vae_inference_seconds_count")) or done,
        "inference_stats": {
            "success": {"count": done, "ns": queue_ns + infer_ns},
            "fail": {"count": int(failed), "ns": 0},
            "queue": {"count": done, "ns": queue_ns},
            "compute_input": instant,
            "compute_infer": {"count": done, "ns": infer_ns},
            "compute_output": instant,
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [],
    }


def offers(model: Model, operation: Operation) -> bool:
    """Whether a variant of a model offers an operation."""
    return any(operation.offered_by(variant) for variant in model.variants.values())


def _indexed(name: str, version: str, known: Condition) -> dict[str, str]:
    return {"name": name, "version": version, "state": STATES[known.state], "reason": known.told}


def _described(tensor: Tensor, axes: list[int]) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": DATATYPES[tensor.dtype], "shape": axes}


def _configured(tensor: Mapping[str, Any], batched: bool) -> dict[str, Any]:
    """A tensor as Triton configures it; one number a row is an axis of one, reshaped to none."""
    dims = tensor["shape"][batched:]
    told = {"name": tensor["name"], "data_type": CONFIG_TYPES[tensor["datatype"]], "dims": dims or [1]}
    return told if dims else {**told, "reshape": {"shape": []}}


def _axes(tensor: Tensor, model: Model, operation: Operation, *, sent: bool) -> list[int]:
    """Lengths of the axes of a tensor, `FREE` where they differ between variants or requests."""
    of_each = [
        _axes_of(tensor, variant, operation, sent=sent)
        for variant in model.variants.values()
        if operation.offered_by(variant)
    ]
    return [lengths[0] if len({*lengths}) == 1 else FREE for lengths in zip(*of_each, strict=False)]


def _axes_of(tensor: Tensor, variant: Model, operation: Operation, *, sent: bool) -> list[int]:
    sizes = dict(zip(PIXELS, variant.input_shape, strict=True))
    if sent and operation.defaults.enlargement > 1:
        sizes |= dict.fromkeys(PIXELS[1:], FREE)
    found: list[int] = []
    for axis in tensor.shape:
        length = int(axis) if axis.isdigit() else sizes.get(axis, FREE)
        found += [one or FREE for one in (variant.latent_shape if axis == "latent" else (length,))]
    return found
