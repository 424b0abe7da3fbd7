"""Comparisons over HTTP and against other ways to train: tables, curves, image sheets."""
