"""One TOML a run: every table is strict, and a run's identity is its settings."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from service.contract.corruption import NoiseFamily
from training.data import Dataset
from training.distributions.likelihoods import Likelihood
from training.distributions.likelihoods.bernoulli import BernoulliSettings
from training.distributions.priors import Prior
from training.distributions.priors.standard_normal import StandardNormalSettings
from training.errors import ConfigError
from training.networks import Architecture
from training.networks.unet import UNetSettings
from training.strict import Positive, Strict

BINARY = {"digits", "mnist"}
"""Data sets whose grey levels are probabilities of black and white."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Model(Strict):
    """What is trained: q(z|x), p(z) and p(x|z)."""

    latent_dim: Positive
    """Numbers in z."""
    initial_std: Annotated[float, Field(gt=0)] | None = None
    """Parameters of both networks begin as N(0, initial_std^2), the paper's with 0.01; without it as torch does."""
    likelihood: Likelihood = BernoulliSettings()
    """p(x|z)."""
    prior: Prior = StandardNormalSettings()
    """p(z)."""
    network: Architecture
    """Of encoder and decoder."""


class Optimisation(Strict):
    """How one stage is trained; M is `batch_size`, L is `draws`."""

    epochs: Positive
    """Passes over the training images."""
    least_steps: Annotated[int, Field(ge=0)] = 0
    """There are more epochs where the images are so few that these would be fewer steps."""
    batch_size: Positive = 100
    """Images in a minibatch, M."""
    objective: Literal["elbo", "monte_carlo_elbo", "importance_weighted", "denoising", "wake_sleep"] = "elbo"
    """The bound, with the KL in closed form where it has one, without it, importance-weighted over the draws, or with
    posteriors of corrupted images; or the rival that raises it by another way."""
    corruption: NoiseFamily = "salt-and-pepper"
    """What `denoising` does to the recognition model's images."""
    corruption_level: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The standard deviation, or the share of pixels."""
    draws: Positive = 1
    """Of z for each image, L."""
    free_nats: Annotated[float, Field(ge=0)] = 0.0
    """While a minibatch's mean KL is below this, nothing pulls it further down."""
    microbatches: Positive = 1
    """Parts of a minibatch, each with noise of its own, that follow one another or that processes share out: the
    result is the same. Their number must be a multiple of the processes'."""
    optimiser: Literal["adam", "muon", "adagrad"] = "adam"
    """Adam; Muon for weight matrices and convolutions with Adam for all else; or the paper's Adagrad."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Reached after `warmup_steps`, then as `schedule` says."""
    matrix_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    """Muon's own, likewise."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """To 0 along half a cosine, or unchanged."""
    weight_prior: bool = False
    """Whether N(0, I) is the prior of every weight (biases have none): MAP, which is the paper's weight decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    """Steps over which the learning rate grows from 0, a tenth of all at most."""
    kl_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the weight of the KL term grows from 0 to 1, a quarter of all at most."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Of the moving average of the weights after many steps; after t steps it is (1 + t) / (10 + t) at most. Evaluated
    and exported are the average or the last weights, whichever have the better bound on validation images."""
    gradient_norm: Annotated[float, Field(gt=0)] = 1000.0
    """Gradients of the summed bound's mean are clipped to this norm."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the networks' matrix products and convolutions; densities, gradients of weights and weights are float32.
    bfloat16 is up to half as fast again where a CPU computes with it, and float32 is used where it does not."""


class Restoration(Strict):
    """The recognition model of corrupted images, q(z | y, mask, level), trained after the VAE."""

    network: Architecture
    """Of the recognition model."""
    level_network: Architecture
    """Of the network that estimates the level of the noise."""
    correction: UNetSettings = UNetSettings()
    """The U-Net that corrects the result."""
    train: Optimisation
    """How long, and how."""


class Evaluation(Strict):
    """What `evaluate` reports on the test images."""

    draws: Positive = 1000
    """Importance samples an image."""
    images: Positive | None = None
    """A seeded random subset of so many; without it all of them."""


class Run(Strict):
    """A whole run: `python -m training fit CONFIG`."""

    name: Name
    """The model's: lower-case letters, digits, `.`, `_` and `-`."""
    version: Name = "1"
    """The version's, likewise; of several the service takes the latest, 10 after 2."""
    seed: int = 0
    """Of the weights, the order of the images and the noise."""
    data: Dataset
    """Which images."""
    binarise: bool | Literal["auto"] = "auto"
    """A fresh Bernoulli draw of every training pixel, every time it is seen; false trains on grey levels. "auto" is
    true for the data sets of digits under Bernoulli pixels."""
    model: Model
    """What is trained."""
    train: Optimisation
    """How it is trained."""
    restoration: Restoration | None = None
    """What denoise, inpaint and super-resolve need; without it the model has none of them."""
    evaluation: Evaluation = Evaluation()
    """How it is measured."""
    tileable: bool = False
    """Whether parts of larger images look like the images trained on, as of a texture or of scans cut to pieces; not of
    whole digits, faces or photographs. Only then does the service restore larger images with `fit=tile`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Run:
        pixels = self.model.likelihood.likelihood
        if pixels != "bernoulli" and self.binarise is True:
            raise ValueError(
                f"binarise = true contradicts the {pixels} likelihood, whose pixels are no draws of 0 and 1; set "
                'binarise = false, or leave it out, or set likelihood = "bernoulli"'
            )
        if self.train.objective == "wake_sleep" and self.model.prior.prior == "vamp":
            raise ValueError(
                "a VampPrior is made of the recognition model, which wake-sleep trains on dreams of the prior"
            )
        return self

    @property
    def binary(self) -> bool:
        """Whether training pixels are drawn anew as 0 or 1."""
        if self.binarise != "auto":
            return self.binarise
        return self.data.dataset in BINARY and self.model.likelihood.likelihood == "bernoulli"


def load(path: Path, changes: Mapping[str, Any] | None = None) -> Run:
    """Read and check a run's TOML.

    Args:
        path: The file.
        changes: Values instead of the file's, in tables as in the file; None changes nothing.

    Raises:
        ConfigError: It names the file, the key and what is wrong with it.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors write a BOM
        return Run.model_validate(_changed(table, changes or {}))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'top level'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {problems}") from error


def _changed(table: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are changed where they are, so that none comes to be by a change of nothing."""
    found = dict(table)
    for key, value in changes.items():
        if isinstance(value, Mapping):
            inner = _changed(found.get(key, {}), value)
            if inner or key in found:
                found[key] = inner
        elif value is not None:
            found[key] = value
    return found
