"""The note `far_from_training`, about rows whose image is of another kind than those that a model was trained on."""

from __future__ import annotations

import numpy as np

from service.contract.images import to_floats
from service.contract.typical import far, figures
from service.operations.inference.vae import Result, noted
from service.operations.operation import Inputs, Rows
from service.runtime.model import Model

DETAIL = (
    "the image differs in brightness, greyness or roughness from those that model {} was trained on, so its answer may "
    "be of no use"
)


def with_typicality(
    model: Model, result: Result, inputs: Inputs, clean: Rows | None = None, family: str | None = None
) -> Result:
    """Add the note about rows that are far from the training images, where the manifest has a sound statistic.

    Args:
        model: The model.
        result: The result of the operation; with noise, its `about` has the level.
        inputs: The inputs, images (n, c, h, w). Those that are tiles or behind a mask get no note.
        clean: Estimates of the clean images; None where the inputs are clean.
        family: Family of the noise in the inputs.
    """
    known = model.manifest.far_from_training
    if known is None or not known.sound or inputs.tiling is not None or inputs.mask is not None:
        return result
    y = to_floats(inputs.rows)  # large images may be levels
    x = y if clean is None else to_floats(clean)
    found = np.flatnonzero(far(figures(y, x, family, result.about.get("level")), known.bounds))
    if not len(found):
        return result
    return noted(result, "far_from_training", inputs.first + found, DETAIL.format(model.manifest.name))
