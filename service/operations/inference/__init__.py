"""Inference that several operations share, as composition over a model's graphs."""
