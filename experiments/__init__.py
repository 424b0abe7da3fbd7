"""Experiments with the trainer and the service: the paper's figures, and comparisons with other methods."""
