"""The settings of a run, read from one TOML file; unknown keys are errors."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from service.contract.corruption import NoiseFamily
from training.data import Dataset, Folder
from training.data.noisy import Noisy
from training.distributions.interface import Support
from training.distributions.likelihoods import LikelihoodSettings
from training.distributions.likelihoods.bernoulli import BernoulliSettings
from training.distributions.likelihoods.noise import NoiseSettings
from training.distributions.poisson_gaussian import BLOCK
from training.distributions.priors import PriorSettings
from training.distributions.priors.standard_normal import StandardNormalSettings
from training.distributions.spoiling import Corruptions
from training.errors import ConfigError
from training.networks import Architecture, LatentArchitecture
from training.networks.conv import Conv
from training.networks.ladder import Ladder
from training.networks.level import LevelSettings
from training.networks.spatial_ladder import SpatialLadderSettings
from training.networks.trunk import TrunkSettings
from training.networks.unet import UNetSettings
from training.strict import Positive, Strict

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Model(Strict):
    """The model: q(z|x), p(z) and p(x|z)."""

    latent_dim: Positive
    """Numbers in z; with spatial latents, at each place; of a ladder, those of the vector above its groups."""
    initial_std: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of the initial parameters of both networks, 0.01 in the paper; without it torch's defaults."""
    likelihood: LikelihoodSettings = BernoulliSettings()
    """p(x|z)."""
    prior: PriorSettings = StandardNormalSettings()
    """p(z)."""
    network: LatentArchitecture
    """Architecture of encoder and decoder."""


class Optimisation(Strict):
    """Settings of one training stage; M is `batch_size`, L is `draws`."""

    epochs: Positive
    """Passes over the training images."""
    least_steps: Annotated[int, Field(ge=0)] = 0
    """Least number of steps: with few images there are more epochs than `epochs`."""
    batch_size: Positive = 100
    """Images a minibatch, M."""
    objective: Literal["elbo", "monte_carlo_elbo", "importance_weighted", "denoising", "wake_sleep"] = "elbo"
    """The bound with the KL in closed form where it has one (`elbo`), with an estimated KL (`monte_carlo_elbo`),
    importance-weighted over the draws, or with posteriors of corrupted images (`denoising`); or wake-sleep."""
    corruption: NoiseFamily = "salt-and-pepper"
    """Corruption of the encoder's images under `denoising`."""
    corruption_level: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Its standard deviation, or its share of pixels."""
    draws: Positive = 1
    """Draws of z an image, L."""
    free_nats: Annotated[float, Field(ge=0)] = 0.0
    """The KL has no gradient while a minibatch's mean KL is below this number of nats; in a ladder, that of each
    group."""
    microbatches: Positive = 1
    """Parts of a minibatch, each with its own noise. One process runs them in turn, or several share them: the result
    is the same. Their number must be a multiple of the number of processes."""
    optimiser: Literal["adam", "muon", "adagrad"] = "adam"
    """Adam; Muon for weight matrices and convolutions, with Adam for all other parameters; or the paper's Adagrad."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate after `warmup_steps`; then `schedule` applies."""
    matrix_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    """Learning rate of Muon, with the same warm-up and schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up: down to 0 along half a cosine; constant, then down to 0 along a line; or
    constant."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the steps, the last ones, in which a `linear` schedule goes down."""
    weight_prior: bool = False
    """Whether every weight has the prior N(0, I), biases none: MAP, the paper's weight decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    """Steps over which the learning rate grows from 0; at most a tenth of all steps."""
    kl_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the weight of the KL term grows from 0 to 1; at most a quarter of all steps."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the weights; after t steps it is at most (1 + t) / (10 + t). The average or the
    last weights are evaluated and exported, whichever have the better bound on validation images."""
    gradient_norm: Annotated[float, Field(gt=0)] = 1000.0
    """Largest norm of a gradient of the mean bound; larger ones are scaled down to it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the networks' matrix products and convolutions; densities, weights and their gradients are
    float32. On a CPU with bfloat16 instructions bfloat16 is up to 1.5 times as fast; without them float32 is used."""


class Restoration(Strict):
    """The recognition model of corrupted images, q(z | y, mask, level), trained after the VAE."""

    network: Architecture
    """Architecture of the recognition model."""
    level_network: Architecture
    """Architecture of the network that estimates the noise level."""
    correction: UNetSettings = UNetSettings()
    """U-Net that corrects the restored image."""
    train: Optimisation
    """Training of this stage."""


class Evaluation(Strict):
    """Evaluation on the test images."""

    draws: Positive = 1000
    """Importance samples an image."""
    images: Positive | None = None
    """Size of a seeded random subset of the test images; without it all of them."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the networks' products, as in training. In bfloat16 the estimate is of the model with products
    so rounded, in up to half the time."""


class CardNotes(Strict):
    """What the model card says that no figure does. Without a key the card has what is known of the data set."""

    purpose: str | None = None
    """What the model is for."""
    not_for: str | None = None
    """What it must not be used for."""
    data: str | None = None
    """What the training images are and where they come from."""
    data_licence: str | None = None
    """Licence of the training images."""
    licence: str | None = None
    """Licence of the model."""
    limits: str | None = None
    """Known faults, and where the model fails."""


class Export(Strict):
    """The written version."""

    weights: Literal["float32", "float16"] = "float32"
    """Number format in which the graphs' large weights are stored. `float16` halves the files; the service computes in
    float32 either way, as fast. The weights are rounded before the run is evaluated."""


class Run(Strict):
    """A whole run: `python -m training fit CONFIG`."""

    name: Name
    """Name of the model: lower-case letters, digits, `.`, `_` and `-`."""
    version: Name = "1"
    """Name of the version, of the same characters; the service serves the latest, and 10 comes after 2."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the noise."""
    data: Dataset
    """The images."""
    binarise: bool | Literal["auto"] = "auto"
    """Whether each training pixel is drawn anew as 0 or 1 every time it is seen; false trains on grey levels. "auto" is
    true where the likelihood accepts only 0 and 1 and the data set's grey levels are probabilities, as digits' are."""
    model: Model
    """The model."""
    train: Optimisation
    """Training of the VAE."""
    restoration: Restoration | None = None
    """Training of denoise, inpaint and super-resolve; without it the model has none of these operations."""
    evaluation: Evaluation = Evaluation()
    """Evaluation of the trained model."""
    card: CardNotes = CardNotes()
    """Words of the model card, the README.md beside the manifest."""
    export: Export = Export()
    """How the version is stored."""
    tileable: bool = False
    """Whether parts of larger images look like the training images, as with textures or tiles of scans, but not with
    whole digits, faces or photographs. Only then does the service restore larger images with `fit=tile`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Run:
        likelihood = self.model.likelihood
        if self.binarise is True and likelihood.support is not Support.BINARY:
            raise ValueError(
                f"binarise = true contradicts the {likelihood.likelihood} likelihood, whose pixels have other values "
                'than 0 and 1; set binarise = false, or leave it out, or set likelihood = "bernoulli"'
            )
        if isinstance(self.model.network, Ladder):
            self._fits_ladder()
        if self.train.objective == "wake_sleep" and self.model.prior.prior == "vamp":
            raise ValueError(
                "a VampPrior contains the encoder, which wake-sleep trains on draws of the prior; set prior = "
                '"standard_normal" or "realnvp"'
            )
        self._check_latents()
        return self

    def _check_latents(self) -> None:
        """Refuse networks whose latents do not fit together."""
        networks = {"model.network": self.model.network}
        if self.restoration is not None:
            networks |= {
                "restoration.network": self.restoration.network,
                "restoration.level_network": self.restoration.level_network,
            }
        kinds = {name: one.latents if isinstance(one, Conv) else "vector" for name, one in networks.items()}
        kind = kinds["model.network"]
        if kind == "pooled":
            raise ValueError('model.network: latents = "pooled" is for a level_network; use "vector" or "spatial"')
        wanted = {"restoration.network": kind, "restoration.level_network": "pooled" if kind == "spatial" else "vector"}
        for name, latents in wanted.items():
            if kinds.get(name, latents) != latents:
                raise ValueError(f'{name} needs latents = "{latents}", because model.network has latents = "{kind}"')
        if kind == "spatial":
            self._check_any_size()

    def _check_any_size(self) -> None:
        """Refuse what does not go with images of any size."""
        if (prior := self.model.prior.prior) != "standard_normal":
            raise ValueError(f'latents = "spatial" needs prior = "standard_normal", because {prior} is of one size')
        step = self.model.network.multiple_of
        if self.restoration is None or step is None:
            return
        if self.restoration.network.multiple_of != step:
            raise ValueError("restoration.network needs as many levels as model.network, so that their latents agree")
        if step % 2 ** (len(self.restoration.correction.channels) - 1):
            raise ValueError(f"restoration.correction has too many levels for images of multiples of {step}")

    def _fits_ladder(self) -> None:
        """Refuse what needs a posterior without noise."""
        if isinstance(self.model.network, Ladder) and self.model.network.top == "spatial":
            raise ValueError('model.network: top = "spatial" is for likelihood = "noise"; leave it out')
        if self.restoration is not None:
            raise ValueError('a ladder has no restoration; remove [restoration], or set architecture = "conv"')
        if self.model.prior.prior == "vamp":
            raise ValueError('a ladder has no VampPrior; set prior = "standard_normal" or "realnvp"')
        if self.train.objective in {"importance_weighted", "wake_sleep"}:
            raise ValueError(
                f'a ladder has no objective {self.train.objective}; set "elbo", "monte_carlo_elbo" or "denoising"'
            )

    @property
    def binary(self) -> bool:
        """Whether training pixels are drawn anew as 0 or 1 (`binarise`, with "auto" decided)."""
        if self.binarise != "auto":
            return self.binarise
        return self.data.stochastic and self.data.support > self.model.likelihood.support


class Imported(Strict):
    """A VAE that others have trained, of fixed weights: in a Python file, or in a folder of diffusers."""

    file: Path | None = None
    """Python file that defines the modules `encoder` and `decoder`, as `export_vae` takes them. It is run."""
    folder: Path | None = None
    """Folder of an AutoencoderKL, as `import diffusers` takes it."""
    value_range: tuple[float, ...] = (0.0, 1.0)
    """Black and white in the modules of `file`, [0.0, 1.0] or [-1.0, 1.0]."""
    multiple_of: Positive | None = None
    """What divides height and width, where the modules of `file` take images of any size."""
    prior: Literal["standard_normal"] | None = None
    """p(z); without it the model cannot be sampled."""

    @model_validator(mode="after")
    def _one_source(self) -> Imported:
        if (self.file is None) == (self.folder is None):
            raise ValueError("name either a file or a folder")
        if self.value_range not in ((0.0, 1.0), (-1.0, 1.0)):
            raise ValueError(f"value_range must be [0.0, 1.0] or [-1.0, 1.0], not {list(self.value_range)}")
        if self.folder is not None and self.model_fields_set & {"value_range", "multiple_of"}:
            raise ValueError("value_range and multiple_of are for a file; a folder tells its own")
        return self


class RestoringRun(Strict):
    """Training of restoration alone: `python -m training fit CONFIG --restore-only`."""

    name: Name
    """Name of the model, as of any run."""
    version: Name = "1"
    """Name of the version."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the noise."""
    data: Dataset
    """The images."""
    imported: Imported
    """The VAE."""
    restoration: Restoration
    """What is trained."""


class TrunkStage(TrunkSettings):
    """The trunk and its training, the first stage: the network that gives E[x | y]."""

    train: Optimisation
    """Training of this stage."""


class LatentsStage(SpatialLadderSettings):
    """The latents given what the trunk has seen, trained after it."""

    train: Optimisation
    """Training of this stage."""


class LevelStage(LevelSettings):
    """The network that estimates the noise, for requests that do not name it, trained on its own."""

    corruptions: Corruptions = Corruptions(
        white=0.55, camera=0.2, jpeg=0.2, missing=0.05, shrunk=0.0, qualities=(10, 98)
    )
    """Corruptions that this stage simulates: also JPEG of which there is nothing to remove."""
    clean: Annotated[float, Field(ge=0, le=1)] = 0.35
    """Share of the images of Gaussian noise that are seen without it, so that clean images are known."""
    train: Optimisation
    """Training of this stage."""


VariantName = Literal["grey", "colour"]
CHANNELS: dict[VariantName, int] = {"grey": 1, "colour": 3}


class ConditionalRun(Strict):
    """A model p(x | y) of photographs given corrupted ones: a TOML with `[trunk]` in place of `[model]`."""

    name: Name
    """Name of the model."""
    version: Name = "1"
    """Name of the version."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the noise."""
    start: Annotated[Path | None, Field(alias="from")] = None
    """Folder of a version whose weights training begins with, such as `models/photos/1`; the networks must be as large
    as its own. `--from` replaces it."""
    data: Folder
    """The images, crops of equal height and width."""
    variants: Annotated[tuple[VariantName, ...], Field(min_length=1)] = ("grey", "colour")
    """Networks of the version. Pictures in grey and in colour are restored by different ones."""
    corruptions: Corruptions = Corruptions()
    """Corruptions that training simulates."""
    trunk: TrunkStage
    """E[x | y]."""
    latents: LatentsStage
    """What E[x | y] leaves open."""
    level: LevelStage
    """Estimation of the noise."""
    colour: dict[str, Any] = Field(default_factory=dict)
    """The tables `trunk`, `latents` and `level` again, with the keys that differ for colour."""
    test_images: Positive = 200
    """Test images that are restored to measure the model; the intervals are calibrated on as many validation images."""
    card: CardNotes = CardNotes()
    """Words of the model card."""
    export: Export = Export(weights="float16")
    """How the version is stored."""

    @model_validator(mode="after")
    def _fits_together(self) -> ConditionalRun:
        if len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants names one twice: {', '.join(self.variants)}")
        if "colour" in self.variants and self.data.mode == "L":
            raise ValueError('variants has "colour", but [data] is grey; set mode = "RGB", or variants = ["grey"]')
        if unknown := self.colour.keys() - {"trunk", "latents", "level"}:
            raise ValueError(f"colour has {', '.join(sorted(unknown))}; it takes trunk, latents and level alone")
        if self.colour and "colour" not in self.variants:
            raise ValueError('colour is given, but variants lacks "colour"')
        for name in self.variants:
            self.of(name).check_networks()
        return self

    def check_networks(self) -> None:
        """Refuse what the networks or their stages do not take.

        Raises:
            ValueError: The message names the keys.
        """
        step = self.multiple_of
        if self.data.height % step or self.data.width % step:
            raise ValueError(
                f"[data] height and width must be multiples of {step}, not {self.data.height} x {self.data.width}"
            )
        for stage in (self.trunk, self.latents, self.level):
            if stage.train.objective != "elbo" or stage.train.draws > 1:
                raise ValueError(
                    "the stages of a conditional model have one objective each; leave out objective, draws"
                )

    @property
    def multiple_of(self) -> int:
        """What divides height and width of the networks' images."""
        return max(4, self.trunk.multiple_of, int(2 ** len(self.latents.channels)))

    def of(self, variant: VariantName) -> ConditionalRun:
        """The run of one variant alone, with the keys that it changes."""
        if self.variants == (variant,) and not self.colour:
            return self
        changes = self.colour if variant == "colour" else {}
        told = self.model_dump(exclude={"colour", "variants"}, exclude_unset=True, by_alias=True)
        return ConditionalRun.model_validate({**_changed(told, changes), "variants": (variant,)})


class NoisyModel(Strict):
    """The model of clean images that only noisy ones show: q(z|y), p(z) and p(y|z)."""

    likelihood: NoiseSettings
    """p(y|z): the noise around the clean signal."""
    network: Ladder
    """Architecture of encoder and decoder, with `top = "spatial"`."""


class NoisyRun(Strict):
    """A model of images that were never clean: a TOML with `likelihood = "noise"`."""

    name: Name
    """Name of the model."""
    version: Name = "1"
    """Name of the version."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the noise."""
    data: Noisy
    """The noisy images."""
    model: NoisyModel
    """The VAE."""
    trunk: TrunkStage
    """The network that gives E[s|y] in one pass, trained before the VAE, which takes its features."""
    train: Optimisation
    """Training of the VAE; `free_nats` are a group's, of one crop."""
    card: CardNotes = CardNotes()
    """Words of the model card."""
    export: Export = Export(weights="float16")
    """How the version is stored."""

    @model_validator(mode="after")
    def _fits_together(self) -> NoisyRun:
        if self.model.network.top != "spatial":
            raise ValueError('model.network needs top = "spatial", because noisy images have any size')
        if self.trunk.channels[0] % 4:
            raise ValueError(f"the first of trunk.channels must be a multiple of 4, not {self.trunk.channels[0]}")
        if self.data.size % self.multiple_of:
            raise ValueError(f"data.size must be a multiple of {self.multiple_of}, not {self.data.size}")
        if any(stage.objective != "elbo" for stage in (self.train, self.trunk.train)) or self.trunk.train.draws > 1:
            raise ValueError("both stages have one objective; leave out objective, and draws in [trunk.train]")
        return self

    @property
    def multiple_of(self) -> int:
        """What divides height and width of the networks' images."""
        return max(BLOCK, self.trunk.multiple_of, self.model.network.multiple_of or 1)


AnyRun = TypeVar("AnyRun", bound=Strict)


def kind_of(path: Path) -> type[Run | ConditionalRun | NoisyRun]:
    """The kind of run that a TOML describes; that of any other file is `Run`, whose `load` says what is wrong."""
    with suppress(OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError):
        told = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        if told.get("model", {}).get("likelihood", {}).get("likelihood") == "noise":
            return NoisyRun
        if "trunk" in told:
            return ConditionalRun
    return Run


def load(path: Path, changes: Mapping[str, Any] | None = None) -> Run:
    """Read and check a run's TOML, as `load_as`."""
    return load_as(Run, path, changes)


def load_as(kind: type[AnyRun], path: Path, changes: Mapping[str, Any] | None = None) -> AnyRun:
    """Read and check the TOML of a run of this kind.

    Args:
        kind: Class of its settings.
        path: The file.
        changes: Values that replace those of the file, in the same tables; None changes nothing.

    Raises:
        ConfigError: The file cannot be read or a value is wrong; the message names the file and the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors write a BOM
        return kind.model_validate(_changed(table, changes or {}))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'top level'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {problems}") from error


def _changed(table: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The table with the changes; a table of Nones does not create a missing table."""
    found = dict(table)
    for key, value in changes.items():
        if isinstance(value, Mapping):
            inner = _changed(found.get(key, {}), value)
            if inner or key in found:
                found[key] = inner
        elif value is not None:
            found[key] = value
    return found
