"""Likelihoods p(x|z) by name; a new one is one file and one name here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from training.distributions.likelihoods.bernoulli import BernoulliSettings
from training.distributions.likelihoods.discretised_logistic import DiscretisedLogisticSettings
from training.distributions.likelihoods.gaussian import GaussianSettings

Settings = BernoulliSettings | DiscretisedLogisticSettings | GaussianSettings
Likelihood = Annotated[Settings, Field(discriminator="likelihood")]
