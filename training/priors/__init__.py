"""Priors p(z) by name; a new one is one file and one line here."""

from training.priors.standard_normal import StandardNormal

PRIORS = {
    "standard_normal": StandardNormal(),
}
