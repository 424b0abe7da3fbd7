"""POST score: how likely images are under the model."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from service.contract.manifest import Scoring
from service.errors import InvalidOption
from service.operations.examples import PROGRESS
from service.operations.inference.latent import MAX_SEED, Noise
from service.operations.inference.scoring import DRAWS, Wish
from service.operations.inference.scoring import score as scored
from service.operations.inference.vae import Result, noted
from service.operations.operation import ImageOptions, Inputs, Operation, check_refinable
from service.runtime.model import Model
from service.runtime.program import Submit

GREY_NOTE = (
    "the model has black and white pixels but was trained on grey levels, which have no probability under them: the "
    "ELBO is an expectation over binarisations and importance_weighted is left out; binarise=sample scores one of them"
)


class ScoreOptions(ImageOptions):
    """How well to score, and what else."""

    draws: Annotated[int, Field(ge=1)] = DRAWS
    """Posterior draws an image, over which everything is averaged."""
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    """Seed of the draws and of the pixels; the answer names the one it used."""
    quality: Literal["fast", "refined"] = "fast"
    """`fast` takes q(z|x) from the encoder; `refined` goes on from there by variational inference for each image,
    some twenty times as much work, which gives way to everybody else's."""
    binarise: Literal["sample", "threshold", "none"] | None = None
    """How grey levels become the black and white that a model of such pixels knows: each pixel drawn with its grey
    level as its probability, or cut at 0.5. By default what was done to the images that the model was trained on."""
    error: bool = False
    """Whether the answer holds `error`, the squared error of every pixel at the posterior's mean."""


def binarisation(model: Model, options: ScoreOptions) -> tuple[Scoring, str]:
    """What the manifest says of scoring, and how the images are made black and white.

    Raises: InvalidOption for a model of grey levels, where nothing else than `none` makes sense.
    """
    scoring = model.manifest.scoring
    assert scoring is not None  # it goes with log_joint
    how = options.binarise or scoring.binarisation
    if how != "none" and not scoring.binary:
        raise InvalidOption(
            f"binarise is {how}, but model {model.manifest.name} scores grey levels as they are; leave it out"
        )
    return scoring, how


def _check(model: Model, inputs: Inputs, options: ScoreOptions) -> None:
    scoring, how = binarisation(model, options)
    if options.quality == "refined":
        check_refinable(model, "elbo_gradient")
    binary_only = scoring.binary and scoring.binarisation != "none"
    if binary_only and how == "none" and not ((inputs.rows == 0.0) | (inputs.rows == 1.0)).all():
        raise InvalidOption(
            "binarise is none, but the images hold grey levels, which have no probability under the black and white "
            f"pixels of model {model.manifest.name}; use binarise=sample or binarise=threshold"
        )


async def _run(model: Model, submit: Submit, inputs: Inputs, options: ScoreOptions) -> Result:
    scoring, how = binarisation(model, options)
    of_grey = scoring.binary and scoring.binarisation == "none" and how == "none"
    wish = Wish(how, not of_grey, options.quality == "refined", options.draws, options.error)
    result = await scored(model.plan, submit, inputs.rows, wish, Noise(options.seed, inputs.first), inputs.observe)
    outputs = dict(result.outputs)
    if how == scoring.binarisation:
        values = scoring.elbo_percentiles_nats
        outputs["percentile"] = np.interp(outputs["elbo"], values, np.arange(101.0)).astype(np.float32)
    result = result._replace(outputs=outputs)
    rows = range(inputs.first, inputs.first + len(inputs.rows))
    return noted(result, "grey_levels", rows, GREY_NOTE) if of_grey else result


score = Operation(
    name="score",
    summary="How likely images are",
    description="The ELBO, a bound on log p(x), with its two terms; importance_weighted, a tighter one over the draws, "
    "with its standard error; and the share of validation images whose ELBO is lower, in percent. All in nats.",
    options=ScoreOptions,
    run=_run,
    takes="images",
    example={"images": ["<base64 of a PNG>"], "seed": 7},
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
    needs=("log_joint",),
    check=_check,
)
