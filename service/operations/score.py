"""The operation score: lower bounds on log p(x) of images, in nats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from service.contract.manifest import Scoring
from service.errors import InvalidOption, InvalidShape
from service.operations.abilities import ENCODING, Need
from service.operations.examples import PICTURE, PROGRESS
from service.operations.inference.latent import MAX_SEED, Noise
from service.operations.inference.refinement import STEPS
from service.operations.inference.scoring import DRAWS, ScoreChoices
from service.operations.inference.scoring import score as scored
from service.operations.inference.vae import Result, noted
from service.operations.operation import (
    IMAGES,
    PIXELS,
    REFINED,
    SEED,
    Asked,
    ImageOptions,
    Inputs,
    Operation,
    Tensor,
)
from service.runtime.model import Model
from service.runtime.program import Submit

GREY_NOTE = (
    "the model has black and white pixels but was trained on grey levels, which have no probability under them: the "
    "ELBO is an expectation over binarisations and importance_weighted is left out; binarise=sample scores one of them"
)


class ScoreOptions(ImageOptions):
    """Options of score: accuracy, binarisation, and further outputs."""

    draws: Annotated[int, Field(ge=1)] = DRAWS
    """Posterior draws for each image; the figures are averages over them."""
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    """Seed of the draws and of the pixels; the answer names the one it used."""
    quality: Literal["fast", "refined"] = "fast"
    """`fast` takes q(z|x) from the encoder. `refined` continues from there by variational inference for each image:
    about 20 times as much work, at low priority."""
    binarise: Literal["sample", "threshold", "none"] | None = None
    """How grey levels become black and white for a model of binary pixels: `sample` draws each pixel with its grey
    level as its probability, `threshold` cuts at 0.5. The default is what the model was trained with."""
    error: bool = False
    """Whether the answer holds `error`, the squared error of each pixel at the posterior's mean."""

    @property
    def multiplicity(self) -> int:
        """Rows that one row of the request becomes."""
        return self.draws

    @property
    def needs(self) -> Mapping[Need, Asked]:
        """What refinement needs of a model."""
        return {"encoder": REFINED, "elbo_gradient": REFINED} if self.quality == "refined" else {}

    def memory_numbers(self, model: Model, image: int, latent: int) -> int:
        """Numbers in memory while one row of the request is answered; see `Options.memory_numbers`."""
        return super().memory_numbers(model, image, latent) + (STEPS * latent if self.quality == "refined" else 0)


def binarisation(model: Model, options: ScoreOptions) -> tuple[Scoring, str]:
    """The manifest's scoring section, and the binarisation of the request.

    Args:
        model: A model with the graph `log_joint`.
        options: The options of the request.

    Returns:
        The section, and `sample`, `threshold` or `none`.

    Raises:
        InvalidOption: The model scores grey levels, so `binarise` must be `none`.
    """
    scoring = model.manifest.scoring
    assert scoring is not None  # every manifest with log_joint has it
    how = options.binarise or scoring.binarisation
    if how != "none" and not scoring.binary:
        raise InvalidOption(
            f"binarise is {how}, but model {model.manifest.name} scores grey levels as they are; leave it out"
        )
    return scoring, how


def _check(model: Model, inputs: Inputs, options: ScoreOptions) -> None:
    scoring, how = binarisation(model, options)
    if inputs.size is not None and inputs.size != inputs.rows.shape[-2:]:
        free = model.manifest.size
        assert free is not None  # images of other models are not padded
        raise InvalidShape(
            f"images of {inputs.size[0]} x {inputs.size[1]} cannot be scored, because no pixels may be added; crop "
            f"them to multiples of {free.multiple_of} that are at least {free.min}"
        )
    binary_only = scoring.binary and scoring.binarisation != "none"
    if binary_only and how == "none" and not ((inputs.rows == 0.0) | (inputs.rows == 1.0)).all():
        raise InvalidOption(
            "binarise is none, but the images hold grey levels, which have no probability under the black and white "
            f"pixels of model {model.manifest.name}; use binarise=sample or binarise=threshold"
        )


async def _run(model: Model, submit: Submit, inputs: Inputs, options: ScoreOptions) -> Result:
    scoring, how = binarisation(model, options)
    of_grey = scoring.binary and scoring.binarisation == "none" and how == "none"
    choices = ScoreChoices(how, not of_grey, options.quality == "refined", options.draws, options.error)
    result = await scored(model, submit, inputs.rows, choices, Noise(options.seed, inputs.first), inputs.observe)
    outputs = dict(result.outputs)
    if how == scoring.binarisation and model.manifest.size is None:
        values = scoring.elbo_percentiles_nats
        outputs["percentile"] = np.interp(outputs["elbo"], values, np.arange(101.0)).astype(np.float32)
    result = result._replace(outputs=outputs)
    rows = range(inputs.first, inputs.first + len(inputs.rows))
    return noted(result, "grey_levels", rows, GREY_NOTE) if of_grey else result


score = Operation(
    name="score",
    summary="How likely images are",
    description="The ELBO, a lower bound on log p(x), with its two terms; importance_weighted, a tighter bound over "
    "the draws, with its standard error; and the share of validation images whose ELBO is lower. Figures are in nats, "
    "shares in percent.",
    options=ScoreOptions,
    run=_run,
    inputs=(IMAGES,),
    outputs=(
        Tensor("elbo", ("n",), "Lower bound on log p(x), in nats"),
        Tensor("log_likelihood", ("n",), "E_q log p(x|z), in nats"),
        Tensor("kl", ("n",), "KL(q(z|x) || p(z)), in nats"),
        Tensor("refined_elbo", ("n",), "ELBO of the refined posterior, with `quality=refined`", required=False),
        Tensor("importance_weighted", ("n",), "Tighter bound on log p(x) over the draws, in nats", required=False),
        Tensor("standard_error", ("n",), "Standard error of `importance_weighted`, in nats", required=False),
        Tensor("percentile", ("n",), "Validation images with a lower ELBO, in percent", required=False),
        Tensor("error", ("n", *PIXELS), "Squared error of each pixel, with `error`", required=False),
        SEED,
        Tensor("binarisation", (), "How grey levels were made black and white", "string"),
    ),
    row_wise=True,
    example={"images": [PICTURE], "seed": 7},
    answer={
        "elbo": [-84.1],
        "log_likelihood": [-59.3],
        "kl": [24.8],
        "importance_weighted": [-80.9],
        "standard_error": [0.4],
        "percentile": [47.2],
        "seed": 7,
        "binarisation": "sample",
    },
    progress=PROGRESS,
    needs=("log_joint", ENCODING),
    check=_check,
    warm_up=({}, {"quality": "refined"}),
)
