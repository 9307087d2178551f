"""Losses that attacks climb, one value a row: (B, K) logits and (B,) labels -> (B,)."""

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")
