"""Networks that draw random numbers: told from others, and given the same draws twice."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def is_random(module: nn.Module, x: Tensor) -> bool:
    """Whether a pass over x draws from the generators of torch, Python or numpy; they are put back."""
    return watched(module, x)[1]


def watched(module: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """What the module says of x, and whether it draws for it; see `is_random`."""
    with seeded(), torch.no_grad():
        before = _states()
        said = module(x)
        return said, _states() != before


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The generators of torch, Python and numpy at `seed`; afterwards they are as they were."""
    with put_back(None):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield


def seed_unit(seed: int, start: int, what: str) -> None:
    """Give a random model the same draws in this unit, whatever came before it."""
    digest = hashlib.sha256(f"{seed} {start} {what}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
    random.seed(digest)
    np.random.seed(np.frombuffer(digest, np.uint32))


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """The global generators put back as they were; a model that is random draws from them."""
    with put_back([device] if device.type == "cuda" else []):
        yield


@contextmanager
def put_back(devices: list[torch.device] | None) -> Iterator[None]:
    """The generators of torch, on these GPUs or all, of Python and of numpy as they were."""
    pythons, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)


def _states() -> list[Any]:
    """Something that a draw changes."""
    numpys: Any = np.random.get_state(legacy=False)
    torchs = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
    return [
        random.getstate(), numpys["state"]["key"].tobytes(), numpys["state"]["pos"], numpys["has_gauss"],
        *(state.numpy().tobytes() for state in torchs),
    ]  # fmt: skip
