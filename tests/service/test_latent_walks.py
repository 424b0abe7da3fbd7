"""interpolate and traverse: the latents they pass through, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.operations.inference.latent import path, standard_normal

Rows = NDArray[np.float32]
Graphs = dict[str, Callable[..., tuple[Rows, ...]]]


def asked(client: httpx.Client, path: str, content: dict[str, Any] | None = None) -> dict[str, Rows]:
    answer = client.post(path, json=content)
    assert answer.status_code == 200, answer.text
    return {name: np.asarray(answer.json()[name], np.float32) for name in ("images", "latents")}


def refused(client: httpx.Client, path: str, content: dict[str, Any] | None, code: str) -> str:
    answer = client.post(path, json=content)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    return str(answer.json()["detail"])


def test_an_arc_turns_evenly_and_a_line_does_not() -> None:
    """Between perpendicular latents of one length the arc keeps it, at even angles; the line's middle is shorter."""
    a, b = np.float32([2.0, 0.0]), np.float32([0.0, 2.0])
    arc, line = path(a, b, 7, spherical=True), path(a, b, 7, spherical=False)
    assert np.allclose(np.linalg.norm(arc, axis=1), 2.0, atol=1e-6)
    assert np.allclose(np.degrees(np.arctan2(arc[:, 1], arc[:, 0])), np.linspace(0.0, 90.0, 7), atol=1e-4)
    assert np.allclose(line, np.linspace(a, b, 7), atol=1e-6)
    for way in (arc, line):
        assert np.array_equal(way[[0, -1]], np.stack([a, b]))


@pytest.mark.parametrize("end", [[-2.0, 0.0], [4.0, 0.0], [0.0, 0.0]])
def test_an_arc_is_a_line_where_there_is_none(end: list[float]) -> None:
    """Between opposite, equal or zero latents every number is finite."""
    start = np.float32([2.0, 0.0])
    assert np.allclose(path(start, np.float32(end), 5, spherical=True), np.linspace(start, end, 5), atol=1e-6)


@pytest.mark.parametrize("spherical", [True, False])
def test_images_are_interpolated_between_their_posterior_means(
    client: httpx.Client, images: Rows, graphs: Graphs, spherical: bool
) -> None:
    """The returned latents decode to the returned images, from images and from latents alike."""
    options = {"steps": 5, "latent_walk": True, "path": "spherical" if spherical else "linear"}
    found = asked(client, "/v1/interpolate", {"images": images[:2].tolist(), **options})
    mean, _ = graphs["encoder"](images[:2])
    assert np.allclose(found["latents"], path(mean[0], mean[1], 5, spherical=spherical), atol=1e-5)
    assert np.allclose(found["images"], graphs["decoder"](found["latents"])[0], atol=1e-5)
    same = asked(client, "/v1/interpolate", {"latents": mean.tolist(), **options})
    assert np.allclose(same["images"], found["images"], atol=1e-5)


def test_interpolate_refuses_what_are_not_two(client: httpx.Client, images: Rows) -> None:
    """Another number than two images or latents is refused, and the message has the number."""
    assert "not 3" in refused(client, "/v1/interpolate", {"images": images.tolist()}, "invalid_shape")
    assert "two latents" in refused(client, "/v1/interpolate", {"latents": [[0.0] * 8]}, "invalid_shape")
    assert "(n, 8)" in refused(client, "/v1/interpolate", {"latents": [[0.0] * 7] * 2}, "invalid_shape")
    refused(client, "/v1/interpolate", {"latents": [[float(0)] * 8] * 2, "steps": 1}, "invalid_option")


def test_traverse_is_a_map_of_equal_probability(client: httpx.Client, graphs: Graphs) -> None:
    """The first axis to the right, the second up, through the middle of the prior; the paper's figure 4."""
    found = asked(client, "/v1/traverse?axes=2,5&size=4&latents=true")
    medians = [NormalDist().inv_cdf((k + 0.5) / 4) for k in range(4)]
    z = found["latents"].reshape(4, 4, 8)
    assert np.allclose(z[:, :, 2], [medians] * 4, atol=1e-6)
    assert np.allclose(z[:, :, 5].T, [medians[::-1]] * 4, atol=1e-6)
    assert not z[..., [0, 1, 3, 4, 6, 7]].any()
    assert np.allclose(found["images"], graphs["decoder"](found["latents"])[0], atol=1e-5)
    picture = Image.open(io.BytesIO(client.post("/v1/traverse", headers={"accept": "image/png"}).content))
    assert picture.size == (80, 80)


def test_traverse_passes_through_a_draw(client: httpx.Client) -> None:
    """With a seed the other latents stay at a draw of the prior."""
    found = asked(client, "/v1/traverse?axes=3&size=5&seed=7&latents=true")["latents"]
    middle = standard_normal(7, 1, (8,))[0]
    others = [k for k in range(8) if k != 3]
    assert found.shape == (5, 8)
    assert np.allclose(found[:, others], middle[others], atol=1e-6)
    assert found[2, 3] == 0.0


def test_traverse_refuses_axes_that_are_not_there(client: httpx.Client) -> None:
    """The message names the existing axes."""
    assert "0 to 7" in refused(client, "/v1/traverse?axes=8", None, "invalid_option")
    assert "different" in refused(client, "/v1/traverse?axes=1,1", None, "invalid_option")
    refused(client, "/v1/traverse?axes=up", None, "invalid_option")
