"""Architectures by name. A new one takes one file and one name here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from training.networks.conv import Conv
from training.networks.ladder import Ladder
from training.networks.mlp import Mlp

Architecture = Annotated[Conv | Mlp, Field(discriminator="architecture")]
LatentArchitecture = Annotated[Architecture | Ladder, Field(discriminator="architecture")]
"""Architectures of a VAE: also those whose latents have groups."""
