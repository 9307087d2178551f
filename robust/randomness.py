"""Networks that draw random numbers: told from others, and given the same draws twice."""

import hashlib

import torch
from torch import Tensor, nn

from attacks.generators import seed_all, seeded, states


def is_random(module: nn.Module, x: Tensor) -> bool:
    """Whether a pass over x draws from the generators of torch, Python or numpy; they are put back."""
    return watched(module, x)[1]


def watched(module: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """What the module says of x, and whether it draws for it; see `is_random`."""
    with seeded(), torch.no_grad():
        before = states()
        said = module(x)
        return said, states() != before


def seed_unit(seed: int, start: int, what: str) -> None:
    """Give a random model the same draws in this unit, whatever came before it."""
    seed_all(int.from_bytes(hashlib.sha256(f"{seed} {start} {what}".encode()).digest()[:8], "little"))
