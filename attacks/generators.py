"""The generators that everybody draws from: torch's, numpy's and Python's; seeded for a while, and put back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def put_back() -> Iterator[None]:
    """All of them as they were before the block."""
    torchs, numpys, pythons = [(each, each.get_state()) for each in _torchs()], np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        for each, state in torchs:
            each.set_state(state)
        np.random.set_state(numpys)
        random.setstate(pythons)


def seed_all(seed: int) -> None:
    """Give each the seed, a number of 64 bits at most."""
    for each in _torchs():
        each.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Each at `seed`; afterwards they are as they were."""
    with put_back():
        seed_all(seed)
        yield


def states() -> list[Any]:
    """Something that any draw changes."""
    numpys: Any = np.random.get_state(legacy=False)
    return [
        random.getstate(), numpys["state"]["key"].tobytes(), numpys["state"]["pos"], numpys["has_gauss"],
        *(each.get_state().numpy().tobytes() for each in _torchs()),
    ]  # fmt: skip


def _torchs() -> list[torch.Generator]:
    """The CPU's and, once CUDA is in use, each GPU's; torch.manual_seed would decide about later use, too."""
    gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *gpus]
