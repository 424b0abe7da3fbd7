"""One TOML a run: every table is strict, and a run's identity is its settings."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from training.architectures import Architecture
from training.datasets import Dataset
from training.errors import ConfigError
from training.strict import Positive, Strict

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Model(Strict):
    """What is trained: q(z|x), p(z) and p(x|z)."""

    latent_dim: Positive
    likelihood: Literal["bernoulli"] = "bernoulli"
    prior: Literal["standard_normal"] = "standard_normal"
    network: Architecture


class Optimisation(Strict):
    """How one stage is trained; M is `batch_size`, L is `draws`."""

    epochs: Positive
    batch_size: Positive = 100
    draws: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Adam's, reached after `warmup_steps` and brought to 0 along half a cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    kl_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the weight of the KL term grows from 0 to 1."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Of the moving average of the weights, which is what is evaluated and exported."""
    gradient_norm: Annotated[float, Field(gt=0)] = 1000.0
    """Gradients of the summed bound's mean are clipped to this norm."""


class Restoration(Strict):
    """The recognition model of corrupted images, q(z | y, mask, level), trained after the VAE."""

    network: Architecture
    level_network: Architecture
    train: Optimisation


class Evaluation(Strict):
    """What `evaluate` reports on the test images."""

    draws: Positive = 1000
    """Importance samples an image."""
    images: Positive | None = None
    """None is all of them; a smaller number takes a seeded random subset."""


class Run(Strict):
    """A whole run: `python -m training fit CONFIG`."""

    name: Name
    version: Name = "1"
    seed: int = 0
    data: Dataset
    binarise: bool = True
    """A fresh Bernoulli draw of every training pixel, every time it is seen; off trains on grey levels."""
    model: Model
    train: Optimisation
    restoration: Restoration | None = None
    evaluation: Evaluation = Evaluation()


def load(path: Path) -> Run:
    """Read and check a run's TOML.

    Raises: ConfigError naming the file, the key and what is wrong with it.
    """
    try:
        return Run.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'top level'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {problems}") from error
