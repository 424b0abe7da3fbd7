"""Measurements of the service and the trainer beside others; every figure is a ratio within one run."""
