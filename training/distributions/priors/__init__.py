"""Priors p(z) by name. A new one takes one file and one name here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from training.distributions.priors.realnvp import RealNvpSettings
from training.distributions.priors.standard_normal import StandardNormalSettings
from training.distributions.priors.vamp import VampSettings

PriorSettings = Annotated[StandardNormalSettings | RealNvpSettings | VampSettings, Field(discriminator="prior")]
"""The table `[model.prior]` of a run's TOML."""
