"""Benchmarks of the service and the trainer against others; every comparison is a ratio within one run."""
