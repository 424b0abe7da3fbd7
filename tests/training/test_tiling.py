"""Margins of tiles: measured from the networks, and enough for tiles that equal the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.export.tiling import margin
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
