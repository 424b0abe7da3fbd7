"""What every architecture has besides its encoder and decoder."""

from __future__ import annotations

from training.strict import Strict


class Network(Strict):
    """An architecture for images of one size, whose latents are vectors. Others override these two."""

    @property
    def multiple_of(self) -> int | None:
        """What divides height and width of images of any size; None where images have one size."""
        return None

    def latent_shape(self, latent_dim: int, _shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of one z, for images of that shape."""
        return (latent_dim,)
