"""Distributions: the diagonal Gaussian, likelihoods p(x|z), priors p(z)."""
