"""The paper's figures, each one command: `python -m training figure N`; a new one is one file and one line here."""

from __future__ import annotations

from training.experiments import figure2, samples

FIGURES = {2: figure2.draw, 4: samples.draw_maps, 5: samples.draw_dreams}
"""By the paper's number: (data folder, checkpoint folder, output folder, samples, pattern of panels) -> None."""
