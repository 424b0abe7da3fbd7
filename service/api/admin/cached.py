"""Bytes that are the same for everybody: kept with an ETag, compressed once, not sent again to who has them."""

from __future__ import annotations

import gzip
from functools import cached_property
from hashlib import blake2b

from fastapi import Request, Response
from werkzeug.http import parse_accept_header

LONGEST_LIST = 512
"""Characters of an Accept-Encoding or If-None-Match header that is looked at; nobody needs more."""


class Kept:
    """One representation and what is sent of it."""

    def __init__(self, content: bytes, media_type: str, max_age_s: int = 0) -> None:
        """max_age_s: how long a browser may use it without asking again."""
        self.content = content
        self.media_type = media_type
        # Weak, for the compressed form has the same.
        self.etag = f'W/"{blake2b(content, digest_size=12).hexdigest()}"'
        self._headers = {
            "etag": self.etag,
            "cache-control": f"public, max-age={max_age_s}" if max_age_s else "no-cache",
            "vary": "Accept-Encoding",
        }

    def answer(self, request: Request) -> Response:
        """All of it, gzip where the caller takes that, or 304 where it has it."""
        if _has(self.etag, request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=self._headers)
        if _takes_gzip(request.headers.get("accept-encoding", "")):
            headers = {**self._headers, "content-encoding": "gzip", "content-type": self.media_type}
            return Response(self._gzip, headers=headers)
        return Response(self.content, headers={**self._headers, "content-type": self.media_type})

    @cached_property
    def _gzip(self) -> bytes:
        return gzip.compress(self.content, mtime=0)


def _has(etag: str, known: str) -> bool:
    tags = {tag.strip().removeprefix("W/") for tag in known[:LONGEST_LIST].split(",")}
    return "*" in tags or etag.removeprefix("W/") in tags


def _takes_gzip(accepted: str) -> bool:
    return "gzip" in accepted and len(accepted) <= LONGEST_LIST and parse_accept_header(accepted)["gzip"] > 0
