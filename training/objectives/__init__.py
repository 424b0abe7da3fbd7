"""Objectives: the ELBO, wake-sleep, full variational Bayes."""
