"""The training loop: steps, checkpoints, randomness, processes, validation."""
