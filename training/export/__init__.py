"""Export of models as versions of the model repository."""

from training.export.pair import export_vae

__all__ = ["export_vae"]
