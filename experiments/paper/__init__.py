"""The figures of Kingma and Welling (2013), each a command: `python -m experiments figure N`."""

from __future__ import annotations

from experiments.paper import figure2, figure3, full_vb, samples

FIGURES = {
    "2": figure2.draw,
    "3": figure3.draw,
    "4": samples.draw_maps,
    "5": samples.draw_dreams,
    "F": full_vb.draw,
}
"""Function of each figure or appendix: (data folder, checkpoint folder, output folder, samples, pattern) -> None."""
