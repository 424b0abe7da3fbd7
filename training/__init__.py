"""The offline trainer: auto-encoding variational Bayes in PyTorch, ending in a version of a served model."""
