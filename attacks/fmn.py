"""FMN: fast minimum-norm attack, on a ball that closes in on the boundary. Pintor et al. 2021, arXiv 2102.12827.

Each step follows the gradient of the margin and ends on the sphere of the present radius. An adversarial point
shrinks the radius; a point that is not enlarges it, or, before the first adversarial, sets it to where a linear model
would have its boundary. Steps and changes of the radius fade as a cosine.

Where this departs from the paper, it finds smaller perturbations at the same cost:
- points lie on the sphere, as in DDN, not anywhere in the ball: inside, the search ends in maxima of the margin;
- the linear guess is overshot, lest it approach the boundary for ever from within;
- steps are fractions of the radius; those in linf follow the sign of the gradient;
- in l1, points are projected onto ball and box at once (arXiv 2103.01208);
- in l0, steps move each value through the box along the mean of the gradients so far, and the values kept are those
  that raise the margin most, not those that moved most;
- the last steps search for the boundary between the best point and the image.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.attack import Attack, MinimalState
from attacks.losses import margin
from attacks.noise import Noise
from attacks.norms import NORMS, per_slot, project_l1_box

STEP = {"linf": 2.0, "l2": 0.3, "l1": 0.1, "l0": 1.0}
DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
MOMENTUM = 0.9  # in l0
SEARCH, WIDTH = 10, 0.1  # steps at the end, and the share of the distance that the first of them would save
START = 0.1  # size of the noise in each value from which restarts begin
FAINT = 1e-6  # of a random direction beside a gradient
TINY = 1e-12


@dataclass(kw_only=True)
class FMNState(MinimalState):
    radius: Tensor  # (B,)
    farthest: Tensor  # (B,) distance to the farthest corner of the box
    direction: Tensor  # (B, C, H, W) where to go where the gradient is zero; in l0, the mean of the gradients


@dataclass(frozen=True, kw_only=True)
class FMN(Attack):
    """`steps` steps, the last tenth of them (10 at most) a search between the best point and the image.

    steps: at least 1; every point is judged, the start and the last one included.
    step_size: length of the first step, as a fraction of the radius; in l1, its l2 length; in l0, the change of each
        value, as a fraction of [0, 1]. None for what suits the norm. It falls to a hundredth.
    gamma: the share by which the radius shrinks and grows at first, in (0, 1). It falls to 0.001.
    restarts: the first run starts from the image, others from noise about it.

    Costs steps + 1 forwards and `steps` gradients.
    """

    name: ClassVar[str] = "fmn"
    source: ClassVar[str] = "arXiv 2102.12827"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    budget: ClassVar[Literal["fixed", "minimal"]] = "minimal"

    steps: int = 100
    step_size: float | None = None
    gamma: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma must be between 0 and 1, not {self.gamma}")

    @property
    def queries(self) -> int:
        return self.steps + 1

    def init(self, state: MinimalState, noise: Noise) -> FMNState:
        radius = torch.ones_like(state.eps)  # of l0; the other norms guess it
        farthest = self.ball.distance(torch.maximum(state.x, 1 - state.x))
        random = noise.normal()
        state.query = start(state, random, noise)
        return FMNState(**vars(state), radius=radius, farthest=farthest, direction=random.mul_(FAINT))

    def loss(self, logits: Tensor, state: MinimalState) -> Tensor:
        loss = margin(logits, state.y)
        return -loss if self.targeted else loss

    def step(self, state: FMNState, logits: Tensor, grad: Tensor) -> FMNState:
        fade, turn = schedule(state, self.steps)
        gamma = 0.001 + (self.gamma - 0.001) * fade
        size = (STEP[self.norm] if self.step_size is None else self.step_size) * (0.01 + 0.99 * fade)
        state.radius = self._radius(state, logits, grad, gamma)
        searching = turn >= 0
        best = state.best - state.x
        if self.norm == "l0":
            delta = torch.where(per_slot(searching, grad), thinned(best, turn), self._sparse(state, grad, size))
        else:
            delta = torch.where(per_slot(searching, grad), best, self._moved(state, grad, size))
            radius = torch.where(searching, search_radius(state, turn), state.radius)
            delta = project_l1_box(state.x, delta, radius) if self.norm == "l1" else self.ball.project_(delta, radius)
        state.query = delta.add_(state.x).clamp_(0, 1)
        return state

    def _radius(self, state: FMNState, logits: Tensor, grad: Tensor, gamma: Tensor) -> Tensor:
        """(B,): the radius that follows on what the model said."""
        fooled = self.fools(logits.argmax(1), state)
        smaller = torch.minimum(state.radius * (1 - gamma), state.best_distance)
        larger = state.radius * (1 + gamma)
        if self.norm == "l0":
            smaller = torch.minimum(smaller.floor(), state.radius - 1).clamp(min=1)
            larger = torch.maximum(larger.floor(), state.radius + 1)
        else:
            slope = torch.linalg.vector_norm(grad.flatten(1), DUAL[self.norm], dim=1).clamp(min=TINY)
            guess = self.ball.distance(state.query - state.x) + self.loss(logits, state).abs() / slope
            larger = torch.where(state.best_distance.isfinite(), larger, guess * (1 + gamma))
        return torch.where(fooled, smaller, larger).minimum(state.farthest)

    def _moved(self, state: FMNState, grad: Tensor, size: Tensor) -> Tensor:
        """The perturbation after a step along the gradient, in l2 and l1 no smaller than the radius."""
        uphill = NORMS["linf" if self.norm == "linf" else "l2"].steepest_(alive(grad, state.direction))
        delta = uphill.mul_(per_slot(size * state.radius, grad)).add_(state.query).sub_(state.x)
        if self.norm == "linf":
            return delta
        return delta.mul_(per_slot((state.radius / self.ball.distance(delta).clamp(min=TINY)).clamp(min=1), delta))

    def _sparse(self, state: FMNState, grad: Tensor, size: Tensor) -> Tensor:
        """The perturbation after a step of every value, of those only that add most to the margin."""
        state.direction = state.direction.lerp(NORMS["l2"].steepest_(grad), 1 - MOMENTUM)
        delta = torch.addcmul(state.query, state.direction.sign(), per_slot(size, grad)).clamp_(0, 1).sub_(state.x)
        gain = (delta * state.direction).clamp_(min=0)
        return delta.mul_(self.ball.project_(gain, state.radius) != 0)


def start(state: MinimalState, random: Tensor, noise: Noise) -> Tensor:
    """Where a run begins: at the image or, in all runs but the first, at standard normal noise about it."""
    again = torch.tensor(noise.restarts, device=random.device) > 0
    return torch.where(per_slot(again, random), torch.add(state.x, random, alpha=START).clamp_(0, 1), state.x)


def schedule(state: MinimalState, steps: int) -> tuple[Tensor, Tensor]:
    """How far step sizes have faded, from 1 to 0 along a cosine; and the turn of the search at the end that is next,
    from 0, negative while there is none, (B,) each.
    """
    descent = steps - min(SEARCH, steps // 10)
    fade = (1 + torch.cos(math.pi * ((state.asked - 1) / descent).clamp(max=1))) / 2
    return fade, torch.where(state.best_distance.isfinite(), state.asked - 1 - descent, -1)


def search_radius(state: MinimalState, turn: Tensor) -> Tensor:
    """(B,): where to ask next between the best point and the image, in a bisection that begins at WIDTH."""
    return state.best_distance * (1 - WIDTH * 0.5**turn)


def thinned(best: Tensor, turn: Tensor) -> Tensor:
    """A perturbation without the smaller half of its values, at the next turn without the least quarter, down to one
    value, which then is another at each turn.
    """
    sizes = best.flatten(1).abs()
    ranks = torch.where(sizes > 0, sizes, torch.inf).argsort(1).argsort(1)
    some = ((sizes > 0).sum(1) * 0.5 ** (turn + 1)).floor().clamp(min=1)
    first = torch.where(some > 1, 0, turn)
    dropped = (ranks >= first[:, None]) & (ranks < (first + some)[:, None])
    return best * ~dropped.view_as(best)


def alive(grad: Tensor, direction: Tensor) -> Tensor:
    """`grad`, or `direction` where it is zero."""
    return torch.where(per_slot(grad.flatten(1).abs().amax(1) > TINY, grad), grad, direction)
