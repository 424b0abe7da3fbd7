"""Cached responses: the same bytes for every client, with an ETag, compressed once, and 304 for a client's copy."""

from __future__ import annotations

import gzip
from functools import cached_property
from hashlib import blake2b

from fastapi import Request, Response

from service.api.request import accepted_codings

LONGEST_LIST = 512
"""Characters of If-None-Match that are read."""


class Kept:
    """One representation of a resource, with its headers.

    Args:
        content: The bytes.
        media_type: Their media type.
        max_age_s: Seconds for which a browser may use them without asking again; 0 always asks.
    """

    def __init__(self, content: bytes, media_type: str, max_age_s: int = 0) -> None:
        self.content = content
        self.media_type = media_type
        # A weak tag, because the compressed form has the same one.
        self.etag = f'W/"{blake2b(content, digest_size=12).hexdigest()}"'
        self._headers = {
            "etag": self.etag,
            "cache-control": f"public, max-age={max_age_s}" if max_age_s else "no-cache",
            "vary": "Accept-Encoding",
        }

    def answer(self, request: Request) -> Response:
        """The response: 304 if If-None-Match names the ETag, else the bytes, with gzip if the client accepts it."""
        if _has(self.etag, request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=self._headers)
        if "gzip" in accepted_codings(request.headers.get("accept-encoding", "")):
            headers = {**self._headers, "content-encoding": "gzip", "content-type": self.media_type}
            return Response(self._gzip, headers=headers)
        return Response(self.content, headers={**self._headers, "content-type": self.media_type})

    @cached_property
    def _gzip(self) -> bytes:
        return gzip.compress(self.content, mtime=0)


def _has(etag: str, known: str) -> bool:
    tags = {tag.strip().removeprefix("W/") for tag in known[:LONGEST_LIST].split(",")}
    return "*" in tags or etag.removeprefix("W/") in tags
