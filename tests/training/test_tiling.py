"""Margins of tiles: measured from the networks, and enough for tiles that equal the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.export.tiling import FELT_STD, felt_margin, margin, noise_in
from training.networks.conv import Conv

NETWORK = Conv(architecture="conv", latents="spatial", channels=(3, 4), blocks=1, head=2)


class Attention(nn.Module):
    """Every place sees every other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, c, h, w) -> the same shape."""
        rows = x.flatten(2).mT
        return nn.functional.scaled_dot_product_attention(rows, rows, rows).mT.reshape(x.shape)


def conv(size: int, stride: int = 1) -> nn.Module:
    """A convolution of one channel."""
    return nn.Conv2d(1, 1, size, stride, padding=size // 2).double()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([conv(1)], 0),
        ([conv(3)], 1),
        ([conv(7), nn.SiLU(), conv(3)], 3 + 1),
        ([nn.ReflectionPad2d(2), nn.Conv2d(1, 1, 5).double()], 2),
        ([nn.MaxPool2d(5, 1, padding=2)], 2),
        ([conv(3, stride=2)], 2),  # one pixel of the next block, so the whole last block is off
        ([conv(3, stride=2), nn.Upsample(scale_factor=2), conv(3)], 3),
        ([conv(3), nn.GroupNorm(1, 1).double()], None),
        ([Attention()], None),
    ],
)
def test_margin_of_known_networks(layers: list[nn.Module], expected: int | None) -> None:
    """Half the width of each convolution, added up; none for what sees all places."""
    assert margin(nn.Sequential(*layers), 1, 2, (16, 32)) == expected


def test_a_reach_beyond_all_lengths_is_none() -> None:
    """Twelve convolutions of 3 x 3 reach 12 pixels: found on a strip of 32, not on one of 16."""
    network = nn.Sequential(*(conv(3) for _ in range(12)))
    assert margin(network, 1, 2, (16,)) is None
    assert margin(network, 1, 2, (16, 32)) == 12


def test_margin_of_the_networks_with_spatial_latents() -> None:
    """Added up by hand over the layers of two levels, in pixels.

    Encoder: 1, two blocks' convolutions of 2 each, 2, then 4 each: 15, so four blocks of 4. Decoder: 4, 8, 4, then 4,
    2, then 1.
    """
    encoder, decoder = NETWORK.encoder((3, 8, 8), 2).double(), NETWORK.decoder(2, (3, 8, 8)).double()
    assert margin(lambda x: encoder(x)[0], 3, 4) == 16
    assert margin(lambda x: decoder(encoder(x)[0]), 3, 4) == 16 + 23


def test_tiles_equal_the_whole_beyond_the_margin() -> None:
    """The reconstruction of a part of an image is that of the image from the margin on, and differs just within."""
    torch.manual_seed(1)
    encoder, decoder = NETWORK.encoder((3, 8, 8), 2).double(), NETWORK.decoder(2, (3, 8, 8)).double()
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        nn.init.normal_(parameter, std=0.3)
    x = torch.rand(1, 3, 8, 160).double()
    with torch.no_grad():
        whole, tile = (decoder(encoder(part)[0]) for part in (x, x[..., :80]))
    found = margin(lambda x: decoder(encoder(x)[0]), 3, 4)
    assert found is not None
    difference = (whole[..., :80] - tile).abs().amax((0, 1, 2))
    assert float(difference[: 80 - found].max()) < 1e-12
    assert float(difference[80 - found]) > 0.0


def test_pixels_that_change_nothing_lie_outside_the_felt_margin() -> None:
    """Of weights 10^-k / 2 at a distance k of up to 7, those beyond 4 change less than a level of 16 bits."""
    row = torch.nn.Conv2d(1, 1, (1, 15), padding=(0, 7), bias=False)
    with torch.no_grad():
        row.weight.copy_(0.5 * 10.0 ** -(torch.arange(15.0) - 7.0).abs()[None, None, None])
    column = torch.nn.Conv2d(1, 1, (5, 1), padding=(2, 0), bias=False)
    nn.init.ones_(column.weight)
    assert felt_margin(row, 1, 2, 1e-5) == 4
    assert margin(row.double(), 1, 2, (32,)) == 7
    assert felt_margin(column, 1, 2, 1e-5) == 2
    assert felt_margin(lambda x: x, 1, 2, 1e-5) == 0


def test_the_noise_of_latents_lies_where_the_image_has_it() -> None:
    """Standard normal, and that of a part of the image is a part of it."""
    y = 0.5 + FELT_STD * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    eps = noise_in(y, 100, 8)
    assert eps.shape == (1, 100, 8, 8)
    assert float(eps.std()) == pytest.approx(1.0, abs=0.05)
    torch.testing.assert_close(noise_in(y[..., 32:], 100, 8), eps[..., 4:], rtol=0, atol=0)
