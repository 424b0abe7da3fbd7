"""Requests of many rows: answered in parts, as if they were whole."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray

from service.api.v1.endpoint import PART_ROWS
from service.app import create_app
from service.operations.inference.latent import BLOCK_ROWS, standard_normal
from service.repository.repository import Repository
from service.runtime.model import Model
from service.settings import Settings

MANY = 2 * PART_ROWS + 100
NPY, RAW = "application/x-npy", "application/octet-stream"
Graphs = dict[str, Callable[..., tuple[NDArray[np.float32], ...]]]


def rows(count: int, width: int) -> NDArray[np.float32]:
    return np.random.default_rng(5).random((count, width), dtype=np.float32)


def post(client: httpx.Client, path: str, body: bytes = b"", accept: str = NPY) -> Any:
    headers = {"accept": accept, **({"content-type": RAW} if body else {})}
    answer = client.post(path, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content)) if accept == NPY else answer


def test_parts_make_the_whole(client: httpx.Client, graphs: Graphs) -> None:
    """Every row is the graph's, in npy and raw; the header announces all of them, and the timing only what is known."""
    z = rows(MANY, 8)
    expected = graphs["decoder"](z)[0]
    assert np.array_equal(post(client, "/v1/decode", z.tobytes()), expected)
    raw = post(client, "/v1/decode", z.tobytes(), RAW)
    assert raw.content == expected.tobytes()
    assert int(raw.headers["content-length"]) == expected.nbytes
    assert "queue" in raw.headers["server-timing"]
    assert "inference" not in raw.headers["server-timing"]


def test_a_form_that_is_not_sent_in_parts_is_whole(client: httpx.Client, graphs: Graphs) -> None:
    """JSON of many rows, and outputs that no binary array holds, which fall back to JSON."""
    z = rows(MANY, 8)
    answer = post(client, "/v1/decode", z.tobytes(), "application/json")
    assert np.allclose(answer.json()["images"], graphs["decoder"](z)[0], atol=1e-6)
    both = "/v1/encode?draws=2&seed=1"
    answer = client.post(
        both, content=rows(MANY, 64).tobytes(), headers={"content-type": RAW, "accept": f"{NPY},*/*;q=0.5"}
    )
    assert answer.headers["content-type"] == "application/json"
    assert np.shape(answer.json()["latents"]) == (MANY, 2, 8)


@pytest.mark.parametrize("count", [1, BLOCK_ROWS, BLOCK_ROWS + 1, PART_ROWS + 1, MANY])
def test_draws_do_not_depend_on_the_parts(client: httpx.Client, graphs: Graphs, count: int) -> None:
    """A seed's rows are the same however many are asked for, and one fresh seed serves the whole answer."""
    z = standard_normal(3, MANY, (8,))
    sampled = post(client, f"/v1/sample?count={count}&seed=3")
    assert np.array_equal(sampled, graphs["decoder"](z[:count])[0])
    fresh = client.post(f"/v1/sample?count={count}", headers={"accept": NPY})
    again = client.post(f"/v1/sample?count={count}&seed={fresh.headers['x-seed']}", headers={"accept": NPY})
    assert fresh.content == again.content


def test_later_draws_are_drawn_without_the_first() -> None:
    """From any row on, within a block and over its end."""
    every = standard_normal(9, 3 * BLOCK_ROWS + 5, (2, 4))
    assert np.array_equal(standard_normal(9, 7, (2, 4), 2 * BLOCK_ROWS), every[2 * BLOCK_ROWS :][:7])
    assert abs(float(np.corrcoef(every[:BLOCK_ROWS].ravel(), every[BLOCK_ROWS : 2 * BLOCK_ROWS].ravel())[0, 1])) < 0.2
    for first, count in ((5, 7), (BLOCK_ROWS - 1, BLOCK_ROWS + 2), (2 * BLOCK_ROWS + 3, 1)):
        assert np.array_equal(standard_normal(9, count, (2, 4), first), every[first : first + count])


def test_an_answer_that_fails_half_way_is_broken_off(
    digits_models: Path, serve: Callable[[FastAPI], AbstractContextManager[str]]
) -> None:
    """The caller sees a connection closed before the announced length, never rows that are wrong; others go on."""
    model = Repository.open(digits_models, "", "CPUExecutionProvider", 1, 8).find("digits", None)

    def decoder(z: NDArray[np.float32]) -> Any:
        if z.max() > 1.0:
            raise RuntimeError("a secret path")
        return model.graphs["decoder"](z)

    failing = Model(model.manifest, {**model.graphs, "decoder": decoder})  # type: ignore[dict-item]
    z = rows(MANY, 8)
    z[-1] = 2.0
    app = create_app(Settings(), Repository({"digits": {"1": failing}}, "digits"))
    with serve(app) as url, httpx.Client(base_url=url) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="closed"):
            post(client, "/v1/decode", z.tobytes())
        assert len(post(client, "/v1/decode", z[:-1].tobytes())) == MANY - 1
        assert 'outcome="inference_failed"} 1.0' in client.get("/metrics").text
