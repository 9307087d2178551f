"""Losses that attacks climb, one value a row: (B, K) logits and (B,) labels -> (B,)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """How far the largest other logit is above that of y: positive where y is not predicted."""
    return _largest_other(logits, y) - _of(logits, y)


def difference(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """How far the logit of `target` is above that of y."""
    return _of(logits, target) - _of(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: the margin over z1 - z3, which no scale of the logits changes. At least 3 classes.

    Croce & Hein 2020, arXiv 2003.01690, equation 6; z1 >= z2 >= ... are the logits sorted.
    """
    z = logits.topk(3, dim=1).values
    return margin(logits, y) / (z[:, 0] - z[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The same towards one class, over z1 - (z3 + z4) / 2. At least 4 classes. Equation 7 there."""
    z = logits.topk(4, dim=1).values
    return difference(logits, y, target) / (z[:, 0] - (z[:, 2] + z[:, 3]) / 2 + 1e-12)


def _of(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).squeeze(1)


def _largest_other(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], -torch.inf).amax(1)
