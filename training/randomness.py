"""Random numbers that are a function of a key."""

from __future__ import annotations

import torch


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """Randomness that is a function of its key alone, so that a resumed run draws what an unbroken one would have."""
    return torch.Generator(device).manual_seed(mixed(*key))


def mixed(*key: int) -> int:
    """A seed that is another for every key."""
    seed = 0
    for part in key:
        seed = (seed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return seed
