"""`GET /`: a page for people, and `/page/...`: its files, and what the caller may do."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from service.api.admin.cached import Kept
from service.api.admin.control import check_allowed
from service.errors import ControlOff
from service.settings import Settings

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".tif": "image/tiff",
}
"""Media types of the page's files, by the end of their names. Other files are not served."""
AGE_S = 365 * 24 * 3600
"""How long browsers keep a file: its URL changes with its content."""
PLACE = "page/files/"
"""Where the page names its files. A request has the version in place of `files`."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""Content-Security-Policy of the page: its own files and the service's answers, no script or style within the page."""
RIGHTS = ("infer", "control")
FORBIDDEN = "this needs the right `{}`, which the API key {} does not have"


class Files:
    """The files of the page, read once.

    Attributes:
        version: Changes with any of them; part of their URLs.
        page: The HTML page. Its links are relative, because a proxy may serve the service under any path.
    """

    def __init__(self, *, docs: bool) -> None:
        """docs: Whether the page links to /docs, in a line of its own."""
        folder = files("service.api.playground") / "static"
        contents = {file.name: file.read_bytes() for file in sorted(folder.iterdir(), key=lambda file: file.name)}
        lines = contents.pop("index.html").splitlines()
        html = b"\n".join(line for line in lines if docs or b'href="docs"' not in line)
        self.version = blake2b(b"".join([html, *contents.values()]), digest_size=6).hexdigest()
        self.page = Kept(html.replace(PLACE.encode(), f"page/{self.version}/".encode()), "text/html; charset=utf-8")
        self._kept = {
            name: Kept(content, MEDIA_TYPES[end], AGE_S)
            for name, content in contents.items()
            if (end := name[name.rfind(".") :]) in MEDIA_TYPES
        }

    def find(self, version: str, name: str) -> Kept:
        """Return a file of the version that is served.

        Raises:
            HTTPException: There is none, or the page is of another version.
        """
        if version != self.version or name not in self._kept:
            raise HTTPException(404)
        return self._kept[name]


def page_router(settings: Settings) -> APIRouter:
    """Make the routes of the page.

    Args:
        settings: The settings of the service.
    """
    router = APIRouter(include_in_schema=False)
    known = Files(docs=settings.docs)

    @router.get("/")
    async def page(request: Request) -> Response:
        answer = known.page.answer(request)
        answer.headers["content-security-policy"] = POLICY
        return answer

    @router.get("/page/access")
    async def access(request: Request) -> dict[str, Any]:
        return allowed(settings, request.scope.get("key"), request.scope.get("rights", ()))

    @router.get("/page/{version}/{name}")
    async def file(request: Request, version: str, name: str) -> Response:
        return known.find(version, name).answer(request)

    return router


def allowed(settings: Settings, key: str | None, rights: Iterable[str]) -> dict[str, Any]:
    """What a caller may do.

    Args:
        settings: The settings of the service.
        key: Name of the caller's API key; None without keys.
        rights: The key's rights.

    Returns:
        `key`, and `may`: for each right the reason why the caller lacks it, None where it has it.
    """
    may = {right: FORBIDDEN.format(right, key) if key and right not in rights else None for right in RIGHTS}
    try:
        check_allowed(settings)
    except ControlOff as error:
        may["control"] = may["control"] or str(error)
    return {"key": key, "may": may}
