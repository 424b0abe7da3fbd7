"""The audit log: a line for every load and unload that is asked for over HTTP, done or refused."""

from __future__ import annotations

import logging
from urllib.parse import quote

from starlette.types import Scope

audit = logging.getLogger("service.audit")


def record(scope: Scope, action: str, model: str, version: str, outcome: str) -> None:
    """Log one line.

    Args:
        scope: The request, which tells who asks: the name of the API key, or the address alone.
        action: `load` or `unload`.
        model: As it was asked for.
        version: As it was asked for; empty is the whole model.
        outcome: `ok`, `partial` where some workers have not followed yet, or the problem's code.
    """
    client = scope["client"][0] if scope.get("client") else ""
    key = scope.get("key", "")
    identity = scope["request_id"].decode()
    who = f"the API key {key}" if key else "a caller without API key"
    audit.info(
        "%s model %s version %s: %s (by %s at %s, request %s)",
        action, quote(model), quote(version) or "(all)", outcome, who, client, identity,
        extra={
            "action": action,
            "model": model,
            "version": version,
            "outcome": outcome,
            "key": key,
            "client": client,
            "request_id": identity,
        },
    )  # fmt: skip
