"""Likelihoods p(x|z) by name; a new one is one file and one line here."""

from training.likelihoods.bernoulli import Bernoulli

LIKELIHOODS = {
    "bernoulli": Bernoulli(),
}
