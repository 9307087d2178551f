"""What FMN, DDN and sigma-zero share: they first ask where a linear model has its nearest boundary, and end in a search
between the best point and the image.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.attack import Attack, MinimalState, cat
from attacks.hyperplane import ONTO, TIE
from attacks.losses import difference, margin
from attacks.noise import Noise
from attacks.norms import NORMS, per_slot

SEARCH, WIDTH = 10, 0.1  # steps at the end, and the share of the distance that the first of them would save
BEYOND = 1.005  # the first point behind the boundary of the linear model, as a multiple of its distance
HAIR = 1e-4  # by how much more than the gap to the boundary it aims, as a share of the gap
START = 0.1  # size of the noise in each value from which restarts begin
FAINT = 1e-6  # weight of the random direction that stands in for a gradient until there is one
TINY = 1e-12  # the least distance that is divided by


@dataclass(kw_only=True)
class ClosingState(MinimalState):
    radius: Tensor  # (B,) of the ball that closes in on the boundary
    farthest: Tensor  # (B,) distance to the farthest corner of the box
    # (B, C, H, W): where to go where the gradient is zero: along that of the nearest look, or noise where none is.
    # FMN in l1 and l0 keeps the mean of the gradients here.
    direction: Tensor
    onto: Tensor  # (B, C, H, W) the shortest way onto a boundary of the linear model
    nearest: Tensor  # (B,) its length; infinite before there is one


@dataclass(frozen=True, kw_only=True)
class Closing(Attack):
    """A look at each of the likeliest classes, steps of the attack's own, a search at the end."""

    budget: ClassVar[Literal["fixed", "minimal"]] = "minimal"

    steps: int = 100

    @property
    def queries(self) -> int:
        return self.steps + 1

    def init(self, state: MinimalState, noise: Noise) -> ClosingState:
        radius = torch.ones_like(state.eps)
        farthest = self.ball.distance(torch.maximum(state.x, 1 - state.x))
        direction = noise.normal()
        state.query = start(state, direction, noise)
        onto, nearest = torch.zeros_like(state.x), torch.full_like(radius, torch.inf)
        known = {"radius": radius, "farthest": farthest, "onto": onto, "nearest": nearest}
        return ClosingState(**vars(state), **known, direction=direction.mul_(FAINT))

    def loss(self, logits: Tensor, state: MinimalState) -> Tensor:
        """The margin; while looking, the difference of the label and one wrong class after the other."""
        if self.targeted:
            return -margin(logits, state.y)
        looks = self._looks(logits)
        wrong = logits.detach().scatter(1, state.y[:, None], -torch.inf).topk(looks, dim=1).indices
        turn = (state.asked - 1).clamp(max=looks - 1)
        one = difference(logits, state.y, wrong.gather(1, turn[:, None]).squeeze(1))
        return torch.where(state.asked <= looks, one, margin(logits, state.y))

    def step(self, state: ClosingState, logits: Tensor, grad: Tensor) -> ClosingState:
        looking = state.asked <= self._looks(logits)
        early, late = (rows.nonzero().squeeze(1) for rows in (looking, ~looking))
        if not len(late):
            return self._look(state, logits, grad)
        if not len(early):
            return self._close(state, logits, grad)
        looked = self._look(state[early], logits[early], grad[early])
        closed = self._close(state[late], logits[late], grad[late])
        return cat(looked, closed)[torch.cat([early, late]).argsort()]

    def _looks(self, logits: Tensor) -> int:
        """How many steps ask at the start, about one wrong class each; as many as search at the end."""
        return 1 if self.targeted else max(1, min(logits.shape[1] - 1, self.steps // 10, SEARCH))

    def _look(self, state: ClosingState, logits: Tensor, grad: Tensor) -> ClosingState:
        """Stay, and learn how far the boundary is in the linear model; after the last look, go beyond the nearest."""
        x, w = state.x.flatten(1), grad.flatten(1)
        gap = ((state.query.flatten(1) - x) * w).sum(1) - self.loss(logits, state)
        gap = torch.where(gap == 0, TIE * w.abs().sum(1), gap)
        # A hair beyond: where the boundary passes through a corner of the box, no point farther out can be reached.
        aim = gap[:, None] * (1 + HAIR)
        onto = onto_l0(x, w, gap) if self.norm == "l0" else ONTO[self.norm](x[:, None], w, aim).squeeze(1)
        side = (w * gap[:, None] > 0).to(x.dtype)
        reached = ((side - x) * w).sum(1).abs() > gap.abs()  # the box may end before
        onto = onto.view_as(grad)
        distance = torch.where(reached, self.ball.distance(onto), torch.inf)
        nearer = distance < state.nearest
        state.onto = torch.where(per_slot(nearer, grad), onto, state.onto)
        state.direction = torch.where(per_slot(nearer, grad), NORMS["l2"].steepest_(grad), state.direction)
        state.nearest = torch.where(nearer, distance, state.nearest)
        leaving = (state.asked == self._looks(logits)) & state.nearest.isfinite()
        beyond = torch.add(state.x, state.onto, alpha=BEYOND).clamp_(0, 1)
        state.query = torch.where(per_slot(leaving, grad), beyond, state.query)
        state.radius = torch.where(leaving, self.ball.distance(state.query - state.x), state.radius)
        return state

    @abstractmethod
    def _close(self, state: ClosingState, logits: Tensor, grad: Tensor) -> ClosingState:
        """A step after the looks."""


def check_gamma(gamma: float) -> None:
    """ValueError for what is no share by which a radius could shrink."""
    if not 0 < gamma < 1:
        raise ValueError(f"gamma must be between 0 and 1, not {gamma}")


def onto_l0(x: Tensor, w: Tensor, gap: Tensor) -> Tensor:
    """(B, d): from points x (B, d), values moved to the edge of the box, as few as bring w · it to gap (B,)."""
    up = w * gap[:, None] > 0
    full = torch.where(w == 0, 0, up.to(x.dtype) - x)
    gain, order = (w * full).abs().sort(dim=1, descending=True)
    needed = gain.cumsum(1) - gain < gap.abs()[:, None]
    return torch.zeros_like(x).scatter_(1, order, full.gather(1, order) * needed)


def start(state: MinimalState, random: Tensor, noise: Noise) -> Tensor:
    """Where a run begins: at the image or, in all runs but the first, at standard normal noise about it."""
    again = torch.tensor(noise.restarts, device=random.device) > 0
    return torch.where(per_slot(again, random), torch.add(state.x, random, alpha=START).clamp_(0, 1), state.x)


def schedule(state: MinimalState, steps: int) -> tuple[Tensor, Tensor]:
    """How far step sizes have faded, from 1 to 0 along a cosine; and the turn of the search at the end that is next,
    from 0, negative while there is none, (B,) each.
    """
    descent = steps - min(SEARCH, steps // 10)
    done = ((state.asked - 1).to(state.x.dtype) / descent).clamp(max=1)
    fade = (1 + torch.cos(math.pi * done)) / 2
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
    return torch.where(per_slot(grad.flatten(1).abs().amax(1) > 0, grad), grad, direction)
