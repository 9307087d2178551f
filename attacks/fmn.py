"""FMN: fast minimum-norm attack, on a ball that closes in on the boundary. Pintor et al. 2021, arXiv 2102.12827.

Each step follows the gradient of the margin and ends on the sphere of the present radius. An adversarial point
shrinks the radius; a point that is not enlarges it, or, before the first adversarial, sets it to where a linear model
would have its boundary. Steps and changes of the radius fade as a cosine.

Where this departs from the paper, it finds smaller perturbations at the same cost:
- the first steps look where a linear model has its boundary with each of the likeliest wrong classes, and the search
  begins at the nearest of these, not on the way to the likeliest;
- points lie on the sphere, as in DDN, not anywhere in the ball: inside, the search ends in maxima of the margin;
- the linear guess is overshot, lest it approach the boundary for ever from within;
- steps are fractions of the radius; those in linf follow the sign of the gradient;
- in l1, where the optimum moves few values, each as far as the box allows, steps are of Frank and Wolfe: a share of the
  way to the point of ball and box that is best for the mean of the gradients so far;
- in l0, steps move each value through the box along the mean of the gradients so far, and the values kept are those
  that raise the margin most, not those that moved most;
- the last steps search for the boundary between the best point and the image.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.closing import TINY, Closing, ClosingState, alive, check_gamma, schedule, search_radius, thinned
from attacks.norms import NORMS, per_slot, project_l1_box

STEP = {"linf": 2.0, "l2": 0.3, "l1": 0.3, "l0": 1.0}
LAST = {"linf": 0.01, "l2": 0.01, "l1": 0.1, "l0": 0.01}  # the last step, as a fraction of the first
DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
MOMENTUM = {"l1": 0.5, "l0": 0.9}  # of the mean of the gradients


@dataclass(frozen=True, kw_only=True)
class FMN(Closing):
    """`steps` steps, the last tenth of them (10 at most) a search between the best point and the image.

    The first tenth (10 at most) ask at the start about one wrong class each.

    steps: at least 1; every point is judged, the start and the last one included.
    step_size: length of the first step, as a fraction of the radius; in l1, the share of the way to the best point of
        ball and box; in l0, the change of each value, as a fraction of [0, 1]. None for what suits the norm. It falls
        to a hundredth, in l1 to a tenth.
    gamma: the share by which the radius shrinks and grows at first, in (0, 1). It falls to 0.001.
    restarts: the first run starts from the image, others from noise about it.

    Costs steps + 1 forwards and `steps` gradients.
    """

    name: ClassVar[str] = "fmn"
    source: ClassVar[str] = "arXiv 2102.12827"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")

    step_size: float | None = None
    gamma: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_gamma(self.gamma)

    def _close(self, state: ClosingState, logits: Tensor, grad: Tensor) -> ClosingState:
        fade, turn = schedule(state, self.steps)
        gamma = 0.001 + (self.gamma - 0.001) * fade
        first = STEP[self.norm] if self.step_size is None else self.step_size
        size = first * (LAST[self.norm] + (1 - LAST[self.norm]) * fade)
        state.radius = self._radius(state, logits, grad, gamma)
        searching = turn >= 0
        best = state.best - state.x
        if self.norm == "l0":
            delta = torch.where(per_slot(searching, grad), thinned(best, turn), self._sparse(state, grad, size))
        else:
            move = self._towards_vertex if self.norm == "l1" else self._uphill
            delta = torch.where(per_slot(searching, grad), best, move(state, grad, size))
            radius = torch.where(searching, search_radius(state, turn), state.radius)
            delta = project_l1_box(state.x, delta, radius) if self.norm == "l1" else self.ball.project_(delta, radius)
        state.query = delta.add_(state.x).clamp_(0, 1)
        return state

    def _radius(self, state: ClosingState, logits: Tensor, grad: Tensor, gamma: Tensor) -> Tensor:
        """(B,): the radius that follows on what the model said."""
        smaller = torch.minimum(state.radius * (1 - gamma), state.best_distance)
        larger = state.radius * (1 + gamma)
        if self.norm == "l0":
            smaller = torch.minimum(smaller.floor(), state.radius - 1).clamp(min=1)
            larger = torch.maximum(larger.floor(), state.radius + 1)
        else:
            slope = torch.linalg.vector_norm(grad.flatten(1), DUAL[self.norm], dim=1)
            gap = self.loss(logits, state).abs() / slope.clamp(min=torch.finfo(grad.dtype).tiny)
            guess = self.ball.distance(state.query - state.x) + gap
            larger = torch.where(state.best_distance.isfinite(), larger, guess * (1 + gamma))
        return torch.where(state.fooled, smaller, larger).minimum(state.farthest)

    def _uphill(self, state: ClosingState, grad: Tensor, size: Tensor) -> Tensor:
        """The perturbation after a step along the gradient, in l2 no smaller than the radius."""
        uphill = self.ball.steepest_(alive(grad, state.direction))
        delta = uphill.mul_(per_slot(size * state.radius, grad)).add_(state.query).sub_(state.x)
        if self.norm == "linf":
            return delta
        return delta.mul_(per_slot((state.radius / self.ball.distance(delta).clamp(min=TINY)).clamp(min=1), delta))

    def _towards_vertex(self, state: ClosingState, grad: Tensor, size: Tensor) -> Tensor:
        """The perturbation, scaled to the radius, after a share of the way to the best of ball and box in l1."""
        self._gather(state, grad)
        delta = state.query - state.x
        delta.mul_(per_slot(state.radius / self.ball.distance(delta).clamp(min=TINY), delta))
        return delta.lerp(vertex(state.x, state.direction, state.radius), per_slot(size, delta))

    def _sparse(self, state: ClosingState, grad: Tensor, size: Tensor) -> Tensor:
        """The perturbation after a step of every value, of those only that add most to the margin."""
        self._gather(state, grad)
        delta = torch.addcmul(state.query, state.direction.sign(), per_slot(size, grad)).clamp_(0, 1).sub_(state.x)
        gain = (delta * state.direction).clamp_(min=0)
        return delta.mul_(self.ball.project_(gain, state.radius) != 0)

    def _gather(self, state: ClosingState, grad: Tensor) -> None:
        state.direction = state.direction.lerp(NORMS["l2"].steepest_(grad), 1 - MOMENTUM[self.norm])


def vertex(x: Tensor, grad: Tensor, radius: Tensor) -> Tensor:
    """The perturbation of l1 size `radius` (B,) at most, with x + it in [0, 1], along which a linear loss rises most.

    Values of the largest |gradient| go as far as the box allows, as many as it takes.
    """
    size, order = grad.flatten(1).abs().sort(dim=1, descending=True)
    side = grad.flatten(1).gather(1, order).sign()
    z = x.flatten(1).gather(1, order)
    room = torch.where(side > 0, 1 - z, z)
    used = (radius[:, None] - (room.cumsum(1) - room)).clamp_(min=0).minimum(room)
    return torch.zeros_like(size).scatter_(1, order, side * used).view_as(x)
