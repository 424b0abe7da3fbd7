"""Likelihoods p(x|z) by name. A new one takes one file and one name here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from training.distributions.likelihoods.bernoulli import BernoulliSettings
from training.distributions.likelihoods.discretised_logistic import DiscretisedLogisticSettings
from training.distributions.likelihoods.gaussian import GaussianSettings

LikelihoodSettings = Annotated[
    BernoulliSettings | DiscretisedLogisticSettings | GaussianSettings, Field(discriminator="likelihood")
]
"""The table `[model.likelihood]` of a run's TOML."""
