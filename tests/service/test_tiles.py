"""Tiles of images of free size: equal to the whole image where that is possible, else as diffusers tiles them."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from service.contract.manifest import Size, Tiles
from service.errors import InferenceFailed, TooLarge
from service.runtime.program import Arrays, FreeSize, ModelProgram
from service.runtime.scheduler import Engine
from service.runtime.tiling import spans, tile_side

SIZE = Size(multiple_of=8, min=16, max=4096)
EXACT, BLENDED = Tiles(margin=5, exact=True), Tiles(margin=0, exact=False, side=64)


def smooth(x: np.ndarray, radius: int) -> np.ndarray:
    """Sums over squares of 2 radius + 1 pixels, with zeros beyond the edges: a convolution."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(radius, radius)] * 2)
    found = np.zeros_like(x)
    for i in range(2 * radius + 1):
        for j in range(2 * radius + 1):
            found += padded[..., i : i + x.shape[-2], j : j + x.shape[-1]]
    return found / np.float32((2 * radius + 1) ** 2)


def shrunk(x: np.ndarray, block: int) -> np.ndarray:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // block, block, w // block, block).mean((3, 5), dtype=np.float32)


def program(compute: Any, tiles: Tiles | None = EXACT, **given: Any) -> ModelProgram:
    return ModelProgram("photo", "denoise", 1, compute, free=FreeSize(SIZE, tiles, 32 * 32), **given)


def ran(of: ModelProgram, *arrays: np.ndarray, side: int = 64, **known: Any) -> Arrays:
    async def run() -> Arrays:
        engine = Engine(max_rows=8, queue_rows=64, tile_pixels=side**2)
        found = await engine.submit(of, arrays, **known)
        await engine.close()
        return found.arrays

    return asyncio.run(run())


@pytest.mark.parametrize("size", [(64, 64), (72, 64), (128, 40), (200, 176), (56, 400)])
def test_tiles_of_convolutions_equal_the_whole_image(size: tuple[int, int]) -> None:
    """Pixels, grids of blocks and draws alike, for every row."""

    def compute(x: np.ndarray, eps: np.ndarray) -> Arrays:
        assert x.dtype == np.float32
        assert max(x.shape[-2:]) <= 64 or size == x.shape[-2:]
        near = smooth(x, 5)
        return near, shrunk(smooth(x, 4), 8), eps + near[:, None]

    rng = np.random.default_rng(0)
    x = rng.random((2, 3, *size), np.float32)
    eps = rng.random((2, 4, 3, *size), np.float32)
    whole = compute(x, eps) if max(size) <= 64 else (smooth(x, 5), shrunk(smooth(x, 4), 8), eps + smooth(x, 5)[:, None])
    for found, known in zip(ran(program(compute), x, eps), whole, strict=True):
        np.testing.assert_allclose(found, known, atol=2e-6)


def test_levels_are_read_and_written_as_levels() -> None:
    """Only tiles are float32; the answer is the nearest level of 8 or 16 bits. So are masks."""
    x = np.random.default_rng(1).integers(0, 256, (1, 3, 120, 200), np.uint8)
    (found,) = ran(program(lambda x: (smooth(x, 5),), images=(0,)), x, levels="uint8")
    assert found.dtype == np.uint8
    whole = smooth(x.astype(np.float32) / 255, 5)
    assert np.abs(found - 255 * whole).max() <= 0.501
    deep = x.astype(np.uint16) * 257
    (same,) = ran(program(lambda x: (x,)), deep)
    np.testing.assert_allclose(same, x / 255.0, atol=1e-6)
    deep = np.random.default_rng(2).integers(0, 65536, x.shape, np.uint16)
    (kept,) = ran(program(lambda x: (x,), images=(0,)), deep, levels="uint16")
    np.testing.assert_array_equal(kept, deep)
    (seen,) = ran(program(lambda mask: (mask,)), np.broadcast_to(x[:, :1] > 99, x.shape))
    np.testing.assert_array_equal(seen, np.broadcast_to(x[:, :1] > 99, x.shape).astype(np.float32))


def test_numbers_an_image_are_medians_over_its_tiles() -> None:
    """Such as an estimated level of noise."""
    x = np.zeros((1, 1, 64, 400), np.float32)
    x[..., :64] = 9.0

    def compute(x: np.ndarray) -> Arrays:
        return (x.mean((2, 3)),)

    assert ran(program(compute), x)[0].shape == (1, 1)
    assert ran(program(compute), x)[0] == 0.0


def blend_v(a: np.ndarray, b: np.ndarray, extent: int) -> np.ndarray:
    """As diffusers.AutoencoderKL.blend_v."""
    extent = min(a.shape[2], b.shape[2], extent)
    for y in range(extent):
        b[:, :, y, :] = a[:, :, -extent + y, :] * (1 - y / extent) + b[:, :, y, :] * (y / extent)
    return b


def blend_h(a: np.ndarray, b: np.ndarray, extent: int) -> np.ndarray:
    return blend_v(a.swapaxes(2, 3), b.swapaxes(2, 3), extent).swapaxes(2, 3)


@pytest.mark.parametrize("size", [(128, 128), (96, 200), (104, 72), (112, 112)])
def test_other_graphs_are_tiled_as_diffusers_does(size: tuple[int, int]) -> None:
    """The loop of diffusers.AutoencoderKL.tiled_decode, for a function that looks at the whole tile."""

    def of_tile(x: np.ndarray) -> np.ndarray:
        answer: np.ndarray = x - x.mean((2, 3), keepdims=True)
        return answer

    x = np.random.default_rng(2).random((1, 2, *size), np.float32)
    rows = [[of_tile(x[:, :, i : i + 64, j : j + 64]) for j in range(0, size[1], 48)] for i in range(0, size[0], 48)]
    known = []
    for i, row in enumerate(rows):
        line = []
        for j, tile in enumerate(row):
            tile = blend_v(rows[i - 1][j], tile, 16) if i else tile  # noqa: PLW2901
            tile = blend_h(row[j - 1], tile, 16) if j else tile  # noqa: PLW2901
            line.append(tile[:, :, :48, :48])
        known.append(np.concatenate(line, 3))
    (found,) = ran(program(lambda x: (of_tile(x),), BLENDED), x)
    np.testing.assert_allclose(found, np.concatenate(known, 2), atol=1e-6)


@pytest.mark.parametrize("length", range(72, 400, 8))
def test_every_pixel_is_of_one_tile(length: int) -> None:
    """The parts that are used follow one another, within what is computed."""
    for tiles in (EXACT, BLENDED, Tiles(margin=11, exact=True)):
        found = spans(length, 64, tiles, 8)
        assert [span.first for span in found] == [0, *(span.end for span in found[:-1])]
        assert found[-1].end == length
        for span in found:
            assert 0 <= span.start <= span.first < span.end <= span.last <= span.stop <= length
            assert span.stop - span.start <= 64


def test_what_cannot_be_tiled_is_refused_by_name() -> None:
    """The message names the operation, the largest size and the setting."""
    x = np.zeros((1, 1, 64, 72), np.float32)
    for of in (program(lambda x: (x,), local=False), program(lambda x: (x,), None)):
        with pytest.raises(TooLarge, match="denoise of model photo takes images of at most 4096 pixels, not 64 x 72"):
            ran(of, x)
    with pytest.raises(TooLarge, match="need at least"):
        ran(program(lambda x: (x,), Tiles(margin=40, exact=True)), x)
    with pytest.raises(InferenceFailed, match="not finite"):
        ran(program(lambda x: (x * np.nan,), images=(0,)), x, levels="uint8")


def test_a_tile_is_as_large_as_setting_and_model_allow() -> None:
    """A multiple, at least the model's least size."""
    assert tile_side(SIZE, EXACT, 100 * 100) == 96
    assert tile_side(SIZE, BLENDED, 100 * 100) == 64
    assert tile_side(SIZE, None, 1) == 16


def test_rows_of_one_size_share_a_batch_and_others_do_not() -> None:
    """Batches hold few rows of large images, and an answer is the same whichever rows share its batch."""
    seen: list[tuple[int, ...]] = []

    def compute(x: np.ndarray) -> Arrays:
        seen.append(x.shape)
        return (smooth(x, 1),)

    of = program(compute)
    rows = [np.full((2, 1, side, side), side, np.float32) for side in (16, 32, 16, 64)]

    async def run() -> list[Arrays]:
        engine = Engine(max_rows=8, queue_rows=64, tile_pixels=2 * 32 * 32)
        trips = await asyncio.gather(*(engine.submit(of, (x,)) for x in rows[:3]))
        await engine.close()
        return [trip.arrays for trip in trips]

    for found, x in zip(asyncio.run(run()), rows, strict=False):
        np.testing.assert_array_equal(found[0], smooth(x, 1))
    assert sorted(seen) == [(2, 1, 32, 32), (4, 1, 16, 16)]
    assert of.sized((rows[0],), 1024) is of.sized((rows[2],), 1024)
    timed = program(compute, timing={1: 1.0})
    assert timed.sized((rows[1],), 1024).batch_rows(8) == 1
    assert timed.sized((rows[3],), 1024).cost_s(1) == 4.0
