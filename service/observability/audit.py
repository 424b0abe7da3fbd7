"""The audit log: one line for every request to load or unload a model."""

from __future__ import annotations

import logging
from urllib.parse import quote

from starlette.types import Scope

audit = logging.getLogger("service.audit")


def record(scope: Scope, action: str, model: str, version: str, outcome: str) -> None:
    """Log one request to load or unload a model.

    Args:
        scope: The request, with the name of the API key, the address of the caller and the request id.
        action: `load` or `unload`.
        model: Name in the request.
        version: Version in the request; empty is the whole model.
        outcome: `ok`, `partial` if some workers have not followed yet, or the problem's code.
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
