"""GET models: what is served, as a person wants to know it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from service.operation import Operation
from service.problems import documented
from service.repository import Model, Repository
from service.routes.examples import example

EXAMPLE = {
    "model": "mnist",
    "version": "1",
    "versions": ["1"],
    "default": True,
    "input_shape": [1, 28, 28],
    "value_range": [0.0, 1.0],
    "latent_shape": [40],
    "latent_dim": 40,
    "likelihood": "bernoulli",
    "prior": "standard_normal",
    "dataset": "mnist",
    "operations": ["encode", "decode", "reconstruct", "denoise", "sample"],
    "quality": {"test_nll_nats": 84.5, "importance_samples": 1000, "images": 10000},
    "training": {"seconds": {"vae": 1552.5}},
    "fingerprint": "0123456789abcdef",
}
ONE = {**example(EXAMPLE), 404: documented()[404]}


def models_router(repository: Repository, operations: tuple[Operation, ...]) -> APIRouter:
    """Routes of one application."""
    router = APIRouter(prefix="/v1/models", tags=["models"])

    def describe(model: Model) -> dict[str, Any]:
        manifest = model.manifest
        return {
            "model": manifest.name,
            "version": manifest.version,
            "versions": list(repository.models[manifest.name]),
            "default": manifest.name == repository.default,
            "input_shape": manifest.input_shape,
            "value_range": manifest.value_range,
            "latent_shape": manifest.latent_shape,
            "latent_dim": manifest.latent_dim,
            "likelihood": manifest.likelihood,
            "prior": manifest.prior,
            "dataset": manifest.dataset,
            "operations": [operation.name for operation in operations if operation.offered_by(model)],
            "quality": manifest.quality,
            "training": manifest.training,
            "fingerprint": manifest.fingerprint,
        }

    @router.get("", summary="Every model, at its latest version", responses=example({"models": [EXAMPLE]}))
    async def all_models() -> dict[str, Any]:
        return {"models": [describe(repository.find(name, None)) for name in repository.models]}

    @router.get("/{model}", summary="One model at its latest version", responses=ONE)
    async def one_model(model: str) -> dict[str, Any]:
        return describe(repository.find(model, None))

    @router.get("/{model}/versions/{version}", summary="One version of a model", responses=ONE)
    async def one_version(model: str, version: str) -> dict[str, Any]:
        return describe(repository.find(model, version))

    return router
