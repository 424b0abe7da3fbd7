"""Encoders and decoders of any size of image."""

from __future__ import annotations

import pytest
import torch

from training.networks import Architecture
from training.networks.conv import Conv, Residual
from training.networks.mlp import Mlp

SHAPES = [(1, 7, 5), (1, 28, 28), (1, 33, 20), (3, 33, 20), (3, 1, 1)]
ARCHITECTURES = [
    Mlp(architecture="mlp", hidden=(6,)),
    Mlp(architecture="mlp", hidden=(8, 6, 4), activation="softplus"),
    Conv(architecture="conv", channels=(4,), blocks=0),
    Conv(architecture="conv", channels=(3, 4, 5), blocks=1, head=2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)
def test_any_shape_goes_in_and_comes_back(architecture: Architecture, shape: tuple[int, int, int]) -> None:
    """The encoder gives a mean and a log_var of the latent's size; the decoder an image of the size that went in."""
    mean, log_var = architecture.encoder(shape, 5)(torch.rand(3, *shape))
    assert mean.shape == log_var.shape == (3, 5)
    assert architecture.decoder(5, shape)(mean).shape == (3, *shape)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)
def test_posterior_starts_at_unit_variance(architecture: Architecture) -> None:
    """Before training log_var is 0 whatever x is."""
    _, log_var = architecture.encoder((1, 7, 5), 4)(torch.randn(6, 1, 7, 5))
    assert torch.equal(log_var, torch.zeros(6, 4))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)
def test_rows_do_not_see_each_other(architecture: Architecture) -> None:
    """A row's result does not depend on the other rows of its batch."""
    encoder, x = architecture.encoder((1, 7, 5), 4).eval(), torch.rand(5, 1, 7, 5)
    torch.testing.assert_close(encoder(x)[0][2:3], encoder(x[2:3])[0])


def test_residual_block_starts_as_the_identity() -> None:
    """Before training a block gives back exactly what it is given."""
    x = torch.randn(2, 3, 7, 5)
    assert torch.equal(Residual(3)(x), x)


def test_mlp_has_the_paper_s_number_of_parameters() -> None:
    """784-500-20 has (784 + 1) 500 + 2 (500 + 1) 20 in the encoder, (20 + 1) 500 + (500 + 1) 784 in the decoder."""
    mlp = Mlp(architecture="mlp", hidden=(500,))
    sizes = [
        sum(p.numel() for p in network.parameters())
        for network in (mlp.encoder((1, 28, 28), 20), mlp.decoder(20, (1, 28, 28)))
    ]
    assert sizes == [392_500 + 20_040, 10_500 + 392_784]


def test_decoder_runs_through_the_hidden_layers_backwards() -> None:
    """Widths of 8 and 6 are 8, 6 in the encoder and 6, 8 in the decoder."""
    mlp = Mlp(architecture="mlp", hidden=(8, 6))
    widths = [
        [layer.out_features for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
        for network in (mlp.encoder((1, 2, 2), 3), mlp.decoder(3, (1, 2, 2)))
    ]
    assert widths == [[8, 6, 3, 3], [6, 8, 4]]


def test_every_level_halves_rounding_up() -> None:
    """33 x 20 becomes 17 x 10, then 9 x 5: what the encoder's last layer is as wide as."""
    encoder = Conv(architecture="conv", channels=(2, 3), blocks=0).encoder((1, 33, 20), 4)
    assert isinstance(encoder.mean, torch.nn.Linear)
    assert encoder.mean.in_features == 3 * 9 * 5


SPATIAL = Conv(architecture="conv", latents="spatial", channels=(3, 4, 5), blocks=1, head=2)


@pytest.fixture
def spatial() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Encoder and decoder with spatial latents, all of whose weights are at work, in double."""
    torch.manual_seed(1)
    networks = SPATIAL.encoder((3, 16, 16), 6).double(), SPATIAL.decoder(6, (3, 16, 16)).double()
    for parameter in (p for network in networks for p in network.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return networks


def test_spatial_latents_take_images_of_any_size(spatial: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    """Made for 16 x 16, the networks take 24 x 40: z has an eighth of it."""
    encoder, decoder = spatial
    mean, log_var = encoder(torch.rand(2, 3, 24, 40).double())
    assert mean.shape == log_var.shape == (2, 6, 3, 5)
    assert decoder(mean).shape == (2, 3, 24, 40)
    assert SPATIAL.latent_shape(6, (3, 24, 40)) == (6, 3, 5)
    assert SPATIAL.multiple_of == 8


def test_spatial_posterior_starts_at_unit_variance() -> None:
    """Before training log_var is 0 whatever x is."""
    _, log_var = SPATIAL.encoder((1, 8, 8), 4)(torch.randn(2, 1, 8, 16))
    assert torch.equal(log_var, torch.zeros(2, 4, 1, 2))
