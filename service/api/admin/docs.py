"""`GET /docs` and `/openapi.json`: documentation for people and for code generators. It works without a network."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable
from functools import cache, lru_cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException

from service.api.admin.cached import Kept

ASSETS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon.png": "image/png",
}
"""Files of Swagger UI that the page names, and their media types."""
ASSET_AGE_S = 3600

# Links are relative, because a proxy may serve the service under any path.
PAGE = bytes(
    get_swagger_ui_html(
        openapi_url="openapi.json",
        title="VAE service",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon.png",
        swagger_ui_parameters={"validatorUrl": None},  # the default validator is on another host
    ).body
)
SCRIPT_HASHES = [
    f"'sha256-{b64encode(sha256(script).digest()).decode()}'"
    for script in re.findall(rb"<script>(.*?)</script>", PAGE, re.DOTALL)
]
"""Hashes of the scripts in the page, for its Content-Security-Policy."""


def docs_router(document: Callable[[], dict[str, Any]]) -> APIRouter:
    """Make the routes of the documentation.

    Args:
        document: Returns the application's OpenAPI document, the same at every call.
    """
    router = APIRouter(include_in_schema=False)
    page = Kept(PAGE, "text/html; charset=utf-8")

    @lru_cache(8)
    def openapi(prefix: str) -> Kept:
        servers = {"servers": [{"url": prefix}]} if prefix else {}
        return Kept(orjson.dumps({**document(), **servers}), "application/json")

    @router.get("/openapi.json")
    async def openapi_json(request: Request) -> Response:
        return openapi(request.scope.get("prefix", "")).answer(request)

    @router.get("/docs")
    async def docs(request: Request) -> Response:
        return page.answer(request)

    @router.get("/docs/{name}")
    async def asset(request: Request, name: str) -> Response:
        if name not in ASSETS:
            raise HTTPException(404)
        return _asset(name).answer(request)

    return router


@cache
def _asset(name: str) -> Kept:
    """A file of Swagger UI, read at its first request."""
    return Kept((files("fastapi_offline") / "static" / name).read_bytes(), ASSETS[name], ASSET_AGE_S)
