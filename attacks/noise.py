"""Random numbers keyed by what they are for, not by when they are drawn.

Philox (Salmon et al. 2011, doi:10.1145/2063384.2063405) is counter-based: the numbers for (seed, sample,
restart, step) are the same in whatever batch, order or process they are drawn, and drawing them touches no
global state.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def sample_key(sample_id: str) -> int:
    """The 64-bit key of a sample's noise, from its id."""
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "little")


@dataclass(frozen=True)
class Noise:
    """The noise of one batch: row b is keyed by (seed, keys[b], restarts[b])."""

    seed: int
    keys: Sequence[int]
    restarts: Sequence[int]
    shape: tuple[int, ...]  # of one row
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the tensors; the numbers are the same in each

    def uniform(self, step: int = 0, stream: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """Uniform in [0, 1), (B, *shape). Draws of different `step` or `stream` are independent."""
        return self._rows(lambda rng, size: rng.random(size, dtype=np.float32), step, stream, shape)

    def normal(self, step: int = 0, stream: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """Standard normal, (B, *shape)."""
        return self._rows(lambda rng, size: rng.standard_normal(size, dtype=np.float32), step, stream, shape)

    def _rows(self, draw, step: int, stream: int, shape: tuple[int, ...] | None) -> Tensor:
        shape = self.shape if shape is None else shape
        rows = np.empty((len(self.keys), *shape), np.float32)
        for row, key, restart in zip(rows, self.keys, self.restarts, strict=True):
            # As uint64, for numpy would make floats of numbers on both sides of 2^63.
            words = np.array([self.seed, key], np.uint64)
            # The lowest counter word is the one that advances within a draw.
            philox = np.random.Philox(key=words, counter=[0, step, restart, stream])
            row[...] = draw(np.random.Generator(philox), shape)
        return torch.from_numpy(rows).to(self.device, self.dtype)
