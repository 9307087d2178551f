"""The shortest way from a point of the box onto a hyperplane without leaving the box.

For points z (B, M, d) in [0, 1], hyperplanes with normals w (B, d) that M points share, and gaps c (B, M): the
delta (B, M, d) of least norm with w · delta = c and z + delta in [0, 1]; where the box ends before the hyperplane,
the delta that goes as far as it can. Zero where w is zero. Croce & Hein 2020, arXiv 1907.02044.

Every delta_i points to the side where w_i delta_i has the sign of c, and z_i has a certain room there. That leaves
one number a point to be found, from one monotone equation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-30
TIE = 1e-6  # a point on the hyperplane has no way to go: each of its values goes this far beyond
LARGEST = 64  # in l1, how many of the |w_i| are put in order at first


def onto_linf(z: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """|delta_i| = min(t, room_i)."""
    side, room = _sides(z, w[:, None], c)
    t = _level(w.abs()[:, None], room, c.abs())
    return side.mul_(room.clamp_(max=t))


def onto_l2(z: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """|delta_i| = min(t |w_i|, room_i)."""
    side, room = _sides(z, w[:, None], c)
    size = w.abs()[:, None]
    full = room.div_(size.clamp(min=TINY))  # the t that takes the whole room
    t = _level(size.square(), full, c.abs())
    return side.mul_(full.clamp_(max=t).mul_(size))


def onto_l1(z: Tensor, w: Tensor, c: Tensor, largest: int = LARGEST) -> Tensor:
    """|delta_i| = room_i for the largest |w_i|, as many as it takes, and a part of the room for the last of them."""
    largest = min(largest, w.shape[1])
    size, order = w.abs().topk(largest, dim=1)
    where = order[:, None].expand(*c.shape, -1)
    side, room = _sides(z.gather(2, where), w.gather(1, order)[:, None], c)
    size = size[:, None]
    gain = room * size
    reached = gain.cumsum(2)
    rest = (c.abs()[:, :, None] - (reached - gain)).clamp_(min=0)
    used = torch.minimum(rest.div_(size.clamp(min=TINY)), room)
    delta = torch.zeros_like(z).scatter_(2, where, side.mul_(used))
    few = (reached[:, :, -1] < c.abs()).any(1)
    if largest < w.shape[1] and bool(few.any()):
        delta[few] = onto_l1(z[few], w[few], c[few], 16 * largest)
    return delta


ONTO: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"linf": onto_linf, "l2": onto_l2, "l1": onto_l1}


def _sides(z: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The sign of every delta_i, and how far z_i is from the box's edge on that side; both (B, M, d)."""
    side = w.sign() * c.sign()[:, :, None]
    edge = torch.gt(side, 0, out=torch.empty_like(z))  # torch.where takes ten times as long
    return side, edge.sub_(z).abs_()


def _level(weight: Tensor, full: Tensor, c: Tensor) -> Tensor:
    """t (B, M, 1) with sum_i weight_i min(t, full_i) = c, infinite where c is out of reach.

    weight (B, 1, d), full (B, M, d), c (B, M), none of them negative. The sum is concave in t, so Newton's method
    from t = 0 never overshoots, and each pass divides gap times slope by four at least: on images it takes one to five.
    """
    t, gap, part = torch.zeros_like(c), c, torch.empty_like(full)
    while True:
        slope = torch.gt(full, t[:, :, None], out=part).mul_(weight).sum(2)
        further = t + gap / slope
        short = (gap > 1e-6 * c) & (further > t)  # the latter is never true of NaN, so the loop ends
        if not bool(short.any()):
            return t[:, :, None]
        t = torch.where(short, further, t)
        gap = c - torch.clamp(full, max=t[:, :, None], out=part).mul_(weight).sum(2)
