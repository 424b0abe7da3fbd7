"""`GET /v1/models...`: models and versions, with the state of each and the reason for it, and their cards."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.admin.cached import Kept
from service.api.problems import documented
from service.contract.manifest import CARD_FILE
from service.errors import NotFound, NotReady, UnknownModel, quoted
from service.operations.examples import PICTURE as DIGIT
from service.operations.examples import example
from service.operations.operation import Operation
from service.repository.repository import Condition, Repository
from service.runtime.model import Model
from service.runtime.scheduler import Engine

VALUE_RANGE = [0.0, 1.0]
"""Black and white of images over HTTP, whatever they are in the graphs."""
EXAMPLE = {
    "model": "mnist",
    "version": "1",
    "state": "ready",
    "reason": "",
    "versions": ["1"],
    "states": [
        {"version": "1", "state": "ready", "reason": ""},
        {"version": "2", "state": "failed", "reason": "mnist/2 cannot be opened: not a graph"},
    ],
    "default_for": ["encode", "decode", "reconstruct", "sample"],
    "input_shape": [1, 28, 28],
    "size": None,
    "tiles": None,
    "value_range": [0.0, 1.0],
    "latent_shape": [40],
    "latent_dim": 40,
    "groups": [],
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "variants": [],
    "likelihood": "bernoulli",
    "prior": "standard_normal",
    "dataset": "mnist",
    "tileable": False,
    "noise_families": ["gaussian", "salt-and-pepper"],
    "operations": ["encode", "decode", "reconstruct", "denoise", "sample"],
    "quality": {"test_nll_nats": 84.5, "importance_samples": 1000, "images": 10000},
    "training": {"seconds": {"vae": 1552.5}},
    "calibration": {"fast": {"gaussian": 0.96}, "refined": {"gaussian": 0.97}},
    "far_from_training": {"sound": True, "held_out": 0.004, "caught": {"inverted": 1.0, "black": 0.99}},
    "calibration_curves": {},
    "fingerprint": "0123456789abcdef",
}
ONE = {**example(EXAMPLE), **documented(UnknownModel)}
READY = {
    **example({"ready": True, "model": "mnist", "version": "1"}),
    **documented(UnknownModel, NotReady),
}
MARKDOWN, PNG = "text/markdown; charset=utf-8", "image/png"
CARD = {
    200: {"content": {"text/markdown": {"example": "# mnist, version 3\n\nA variational auto-encoder of ..."}}},
    **documented(NotFound, UnknownModel, NotReady),
}
PICTURE = {
    200: {
        "content": {
            **CARD[200]["content"],
            PNG: {
                "schema": {"type": "string", "contentMediaType": PNG},
                "examples": {"picture": {"summary": "The picture in base64", "value": DIGIT}},
            },
        }
    },
    **documented(NotFound, UnknownModel, NotReady),
}


def states(repository: Repository, name: str) -> list[dict[str, str]]:
    """State of every known version of a model, with the reason for it."""
    return [_state(version, found) for version, found in repository.conditions.get(name, {}).items()]


def _state(version: str, found: Condition) -> dict[str, str]:
    return {"version": version, "state": found.state, "reason": found.told}


def _told(model: Model, operations: tuple[Operation, ...]) -> dict[str, Any]:
    """What the manifest tells of a version, and what it can do."""
    manifest, far = model.manifest, model.manifest.far_from_training
    return {
        **_variant(model, operations),
        "size": None if manifest.size is None else manifest.size.model_dump(),
        "tiles": None if manifest.tiles is None else manifest.tiles.model_dump(),
        "value_range": VALUE_RANGE,
        "scaling_factor": manifest.scaling_factor,
        "shift_factor": manifest.shift_factor,
        "variants": [_variant(one, operations) for one in model.variants.values() if one is not model],
        "likelihood": manifest.likelihood,
        "prior": manifest.prior,
        "dataset": manifest.dataset,
        "tileable": manifest.tileable,
        "noise_families": manifest.noise_families,
        "quality": manifest.quality,
        "training": manifest.training,
        "calibration": {} if manifest.calibration is None else manifest.calibration.factors,
        "far_from_training": None if far is None else far.model_dump(include={"sound", "held_out", "caught"}),
        "calibration_curves": {} if manifest.calibration is None else manifest.calibration.model_dump()["curves"],
        "fingerprint": manifest.fingerprint,
    }


def _variant(model: Model, operations: tuple[Operation, ...]) -> dict[str, Any]:
    """What differs between variants of a version; shapes are as the manifest writes them."""
    manifest = model.manifest
    return {
        "input_shape": manifest.input_shape,
        "latent_shape": manifest.latent_shape,
        "latent_dim": manifest.latent_dim,
        "groups": [group.model_dump() for group in manifest.groups],
        "operations": [operation.name for operation in operations if operation.offered_by(model)],
    }


def ready(repository: Repository, engine: Engine, name: str, version: str | None) -> dict[str, Any]:
    """Check that a version of a model gets requests.

    Args:
        repository: The models of this worker.
        engine: Its batchers.
        name: Name of the model.
        version: The version; None is the latest that is served.

    Returns:
        The body of the answer.

    Raises:
        NotReady: The version is not served, or the engine has stopped; the message has the reason.
        UnknownModel: There is no such model or version.
    """
    known = repository.conditions.get(name, {})
    if version is not None and known and version not in known:
        raise UnknownModel(f"model {name} has no version {version:.80}; it has {', '.join(known)}")
    wanted = known if version is None else {one: known[one] for one in known if one == version}
    if wanted and not repository.models.get(name, {}).keys() & wanted.keys():
        raise NotReady("; ".join(f"version {one} is {found.state}: {found.told}" for one, found in wanted.items()))
    model = repository.find(name, version)
    if not engine.healthy:
        raise NotReady("the engine has stopped")
    return {"ready": True, "model": name, "version": model.manifest.version}


def models_router(repository: Repository, operations: tuple[Operation, ...]) -> APIRouter:
    """Make the routes that describe models.

    Args:
        repository: The models of this worker.
        operations: The operations that the application has.
    """
    router = APIRouter(prefix="/v1/models", tags=["models"])

    def overview(name: str) -> dict[str, Any]:
        served = list(repository.models.get(name, ()))
        default_for = [one.name for one in operations if repository.defaults.of(one.name) == name]
        return {"versions": served, "states": states(repository, name), "default_for": default_for}

    def condition(name: str, version: str) -> dict[str, str]:
        return _state(version, repository.conditions[name][version])

    def latest(name: str) -> dict[str, Any]:
        """Describe the latest served version; only the states of all versions if none is served."""
        if name in repository.conditions and name not in repository.models:
            return {"model": name, **overview(name)}
        return describe(repository.find(name, None))

    def describe(model: Model) -> dict[str, Any]:
        manifest = model.manifest
        return {
            "model": manifest.name,
            **condition(manifest.name, manifest.version),
            **overview(manifest.name),
            **_told(model, operations),
        }

    @router.get("", summary="Every model, at its latest version", responses=example({"models": [EXAMPLE]}))
    async def all_models() -> dict[str, Any]:
        return {"models": [latest(name) for name in repository.conditions]}

    @router.get("/{model}", summary="One model at its latest version", responses=ONE)
    async def one_model(model: str) -> dict[str, Any]:
        return latest(model)

    @router.get("/{model}/versions/{version}", summary="One version of a model", responses=ONE)
    async def one_version(model: str, version: str) -> dict[str, Any]:
        if version in repository.conditions.get(model, ()) and version not in repository.models.get(model, ()):
            return {"model": model, **condition(model, version), **overview(model)}
        return describe(repository.find(model, version))

    return router


def card_router(repository: Repository) -> APIRouter:
    """Make the routes of the model cards.

    Args:
        repository: The models of this worker.
    """
    router = APIRouter(prefix="/v1/models", tags=["models"], default_response_class=Response)

    @router.get("/{model}/card", summary="The card of a model's latest version", responses=CARD)
    async def model_card(request: Request, model: str) -> Response:
        return card_file(repository.find(model, None), CARD_FILE).answer(request)

    @router.get("/{model}/card/{file}", summary="A file of that card: README.md, or its picture", responses=PICTURE)
    async def model_card_file(request: Request, model: str, file: str) -> Response:
        return card_file(repository.find(model, None), file).answer(request)

    @router.get("/{model}/versions/{version}/card", summary="The card of a version", responses=CARD)
    async def version_card(request: Request, model: str, version: str) -> Response:
        return card_file(repository.find(model, version), CARD_FILE).answer(request)

    @router.get("/{model}/versions/{version}/card/{file}", summary="A file of that card", responses=PICTURE)
    async def version_card_file(request: Request, model: str, version: str, file: str) -> Response:
        return card_file(repository.find(model, version), file).answer(request)

    return router


def card_file(model: Model, name: str) -> Kept:
    """Return a file of a model's card.

    Args:
        model: The model.
        name: Name of the file, from the client.

    Raises:
        NotFound: The model has no card, or its card has no such file.
    """
    manifest, files = model.manifest, model.card
    if not files:
        folder = f"{manifest.name}/{manifest.version}"
        raise NotFound(f"{folder} has no card; `python -m training card` with its folder writes one, then load it anew")
    if name not in files:
        raise NotFound(f"the card has no file {quoted(name)}; its files are {', '.join(files)}")
    return _kept(files[name], MARKDOWN if name == CARD_FILE else PNG)


@lru_cache(16)
def _kept(content: bytes, media_type: str) -> Kept:
    return Kept(content, media_type)


def readiness_router(repository: Repository, engine: Engine) -> APIRouter:
    """Make the routes that report whether a model is ready.

    Args:
        repository: The models of this worker.
        engine: Its batchers.
    """
    router = APIRouter(prefix="/v1/models", tags=["models"])

    @router.get("/{model}/ready", summary="Whether a version of a model is served", responses=READY)
    async def model_ready(model: str) -> dict[str, Any]:
        return ready(repository, engine, model, None)

    @router.get("/{model}/versions/{version}/ready", summary="Whether a version is served", responses=READY)
    async def version_ready(model: str, version: str) -> dict[str, Any]:
        return ready(repository, engine, model, version)

    return router
