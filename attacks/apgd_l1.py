"""How APGD walks in l1. Croce & Hein 2021, arXiv 2103.01208.

The steepest step in l1 moves one value only; here a step moves as many as the best point so far would suggest, all
alike. The walk begins in a ball of three times the radius and ends in the ball itself: a way in from outside. What
it finds before the last phase lies outside eps and counts for nothing.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.attack import State
from attacks.noise import Noise
from attacks.norms import NORMS, per_slot, project_l1_box

RADII = (3.0, 2.0, 1.0)  # of the phases, in eps
SHRINK = 1.5
LEAST = 10.0  # the smallest step is this fraction of the largest


@dataclass(kw_only=True)
class SparseState(State):
    best: Tensor  # (B, C, H, W) the point of the highest loss in this phase
    best_loss: Tensor  # (B,)
    best_grad: Tensor  # (B, C, H, W)
    size: Tensor  # (B,) of the next step, in the radius of the phase
    changed: Tensor  # (B,) how many values the best point changed when last looked at


def queries(steps: int) -> int:
    return steps + len(RADII)  # every phase has a start


def init(steps: int, state: State, noise: Noise) -> SparseState:
    x = state.x
    start = x + project_l1_box(x, noise.normal(), RADII[0] * state.eps)
    nothing = torch.full_like(state.eps, -torch.inf)
    known = vars(state) | {"query": start.clamp_(0, 1)}
    return SparseState(
        **known, best=start, best_loss=nothing, best_grad=torch.zeros_like(x), size=torch.ones_like(nothing),
        changed=torch.zeros_like(nothing),
    )  # fmt: skip


def step(steps: int, state: State, loss: Tensor, grad: Tensor) -> SparseState:
    assert isinstance(state, SparseState)
    x, d = state.x, state.x[0].numel()
    phase, begins, due, ends = _phase(steps, state.asked)

    better = loss > state.best_loss
    state.best = torch.where(per_slot(better, x), state.query, state.best)
    state.best_grad = torch.where(per_slot(better, x), grad, state.best_grad)
    state.best_loss = torch.where(better, loss, state.best_loss)

    changed = NORMS["l0"].distance(state.best - x)
    sparser = due & ~begins & (changed / state.changed < 0.95)
    shorter = torch.where(due, (state.size / SHRINK).clamp_(min=1 / LEAST), state.size)
    state.size = torch.where(begins | sparser, 1.0, shorter)
    state.changed = torch.where(due, changed, state.changed)
    here = torch.where(per_slot(sparser, x), state.best, state.query)
    grad = torch.where(per_slot(sparser, x), state.best_grad, grad)

    radius = torch.tensor(RADII, device=x.device)[phase] * state.eps
    flat = grad.flatten(1).abs()
    moving = d - ((1 - state.changed / d / 1.5) * d).long().clamp_(0, d - 1)
    least = flat.topk(int(moving.max())).values.gather(1, moving[:, None] - 1)
    sparse = grad.sign() * (flat >= least).view_as(x)
    moved = sparse.mul_(per_slot(state.size * radius / sparse.flatten(1).abs().sum(1).clamp_(min=1e-10), x))
    onward = x + project_l1_box(x, here + moved - x, radius)

    if bool(ends.any()):
        # The next phase begins at the best point of this one, drawn into the smaller ball.
        smaller = torch.tensor((*RADII[1:], RADII[-1]), device=x.device)[phase] * state.eps
        onward = torch.where(per_slot(ends, x), x + project_l1_box(x, state.best - x, smaller), onward)
        state.best_loss = torch.where(ends, -torch.inf, state.best_loss)
    state.query = onward.clamp_(0, 1)
    return state


def _phase(steps: int, asked: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each slot (B,): the phase of the point just asked about; whether it was its first; whether step and sparsity
    are looked at there; whether it was its last and another phase follows.
    """
    early = min(math.ceil(0.3 * steps), steps // 2)
    lengths = torch.tensor([early, early, steps - 2 * early], device=asked.device)
    starts = torch.tensor([1, early + 2, 2 * early + 3], device=asked.device)
    phase = (asked[:, None] >= starts[1:]).sum(1)
    made = asked - starts[phase]  # steps in this phase
    every = (lengths * 4 // 100).clamp_(min=1)  # 0.04 of them
    return phase, made == 0, made % every[phase] == 0, (made == lengths[phase]) & (phase + 1 < len(RADII))
