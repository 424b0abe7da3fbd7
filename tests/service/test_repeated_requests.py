"""What is kept of a request for those that repeat its head or its options: bounded, and no licence for the next."""

from __future__ import annotations

import httpx
import numpy as np
import pytest

from service.api import validation
from service.api.v1 import endpoint
from service.api.validation import terms_of
from service.operations.encode import encode
from service.operations.operation import DrawOptions
from service.runtime.model import Model

ROW = np.zeros((1, 1, 8, 8), np.float32).tobytes()
HEADERS = {"content-type": "application/octet-stream", "accept": "application/json", "x-timeout-ms": "8765"}


def test_terms_are_those_of_the_options_however_many_there_are(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options whose memory another request's options take get terms of their own."""
    monkeypatch.setattr(validation, "MOST_TERMS", 8)
    for draws in range(1, 100):
        assert terms_of(encode, model, DrawOptions(draws=draws)).multiplicity == draws
        assert len(model.terms) <= 8
    options = DrawOptions(draws=3)
    assert terms_of(encode, model, options) is terms_of(encode, model, options)


def test_heads_are_kept_up_to_a_number_and_a_length(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers choose them, so they take no more memory than that."""
    monkeypatch.setattr(endpoint, "MOST_HEADS", 4)
    made: list[endpoint.Head] = []
    read = endpoint.OperationApp._head
    monkeypatch.setattr(endpoint.OperationApp, "_head", lambda *told: made.append(found := read(*told)) or found)

    def ask(**headers: str) -> int:
        before = len(made)
        client.post("/v1/encode", content=ROW, headers=HEADERS | headers).raise_for_status()
        return len(made) - before

    assert [ask(), ask()] == [1, 0]
    assert [ask(**{"x-timeout-ms": str(9000 + k)}) for k in range(4)] == [1] * 4
    assert ask() == 1, "the first of five is no longer kept"
    long = {"accept": "application/json," + ",".join(f"text/x{k}" for k in range(99))}
    assert [ask(**long), ask(**long)] == [1, 1]


def test_a_head_that_is_kept_lets_nothing_through(client: httpx.Client) -> None:
    """The body, the fingerprint and the time are each request's own."""
    for _ in range(2):
        assert client.post("/v1/encode", content=ROW, headers=HEADERS).status_code == 200
        assert client.post("/v1/encode", content=b"", headers=HEADERS).json()["code"] == "unreadable_body"
        assert client.post("/v1/encode", content=ROW[:-4], headers=HEADERS).json()["code"] == "invalid_shape"
        other = client.post("/v1/encode", content=ROW, headers=HEADERS | {"x-fingerprint": "another"})
        assert other.json()["code"] == "wrong_model"
        assert client.post("/v1/encode?draws=x", content=ROW, headers=HEADERS).json()["code"] == "invalid_option"
