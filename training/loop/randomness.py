"""Seeded random numbers that are a function of a key."""

from __future__ import annotations

import torch
from torch import Tensor


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator whose draws depend on the key alone, so that a resumed run draws the same numbers."""
    return torch.Generator(device).manual_seed(mixed(*key))


def mixed(*key: int) -> int:
    """A seed that differs between keys."""
    seed = 0
    for part in key:
        seed = (seed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return seed


def row_order(images: Tensor, *key: int) -> Tensor:
    """Row indices of `images` in random order, (n,), on their device; a function of their number and the key."""
    order = torch.randperm(len(images), generator=keyed_generator(torch.device("cpu"), *key))
    return order.to(images.device)
