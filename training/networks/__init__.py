"""Architectures by name. A new one takes one file and one name here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from training.networks.conv import Conv
from training.networks.mlp import Mlp

Architecture = Annotated[Conv | Mlp, Field(discriminator="architecture")]
