"""FAB: the fast adaptive boundary attack, targeted. Croce & Hein 2020, arXiv 1907.02044."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.attack import Attack, MinimalState, State
from attacks.hyperplane import ONTO, TIE
from attacks.losses import difference, margin
from attacks.noise import Noise
from attacks.norms import per_slot

SAVED = 0.02  # share of the distance that the search at the end tries to save at first


@dataclass(kw_only=True)
class FABState(MinimalState):
    ahead: Tensor  # (B,) bool: whether the query is a step ahead or of the search; else it is where the next one starts
    iteration: Tensor  # (B,) how many steps ahead have been asked about, then those of the search


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """The least distance at which a wrong class overtakes the label, from the linearised difference of their logits.

    Each iteration projects both the point and the clean image onto the hyperplane where the two classes tie in
    linear approximation, overshoots a little, and goes to a mean of the two. From an adversarial point it then draws
    back towards the clean image. At the end it searches between the nearest adversarial and the image.

    steps: iterations, at least 1.
    n_targets: how many wrong classes it aims at in turn, likeliest first; all where there are fewer.
    alpha_max: the largest weight of the clean image's projection; 0 lets the point wander from its own projection.
    eta: overshoot; 1 stops on the hyperplane, where the sign is a matter of rounding.
    beta: how much of the perturbation stays when it draws back; 1 draws nothing back.
    search: forwards at the end that try to save a fiftieth of the distance, half of that, and so on: by so much the
        iterations overshoot. AutoAttack has no such search; the paper's follows a secant, which on a linear network may
        stop short of the boundary for ever, by rounding.
    restarts: all but the first begin at a random point eps / 2 away.

    A step ahead is judged by a forward alone, as nearly all end in an adversarial. The gradient is asked for at the
    point drawn back or, where it failed, at the same point once more.

    Costs two forwards and one gradient an iteration, and `search` forwards (one where nothing was found), for each
    target and restart.
    """

    name: ClassVar[str] = "fab-t"
    source: ClassVar[str] = "arXiv 1907.02044"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    budget: ClassVar[Literal["fixed", "minimal"]] = "minimal"

    steps: int = 100
    n_targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    search: int = 3

    @classmethod
    def cost(cls) -> str:
        return "2 forwards, 1 gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search < 0:
            raise ValueError(f"search must be at least 0, not {self.search}")

    @property
    def targets(self) -> int:
        return 0 if self.targeted else self.n_targets

    @property
    def queries(self) -> int:
        return 2 * self.steps + self.search

    def last(self, state: State) -> Tensor:
        assert isinstance(state, FABState)
        searched = state.iteration > self.steps
        return (state.iteration == self.steps + self.search) | (searched & state.best_distance.isinf())

    def init(self, state: MinimalState, noise: Noise) -> FABState:
        again = torch.tensor(noise.restarts, device=state.x.device) % self.restarts > 0
        if bool(again.any()):
            direction = noise.uniform().mul_(2).sub_(1) if self.norm == "linf" else noise.normal()
            radius = torch.where(again, state.eps / 2, 0)
            direction.mul_(per_slot(radius / self.ball.distance(direction), direction))
            state.query = direction.add_(state.x).clamp_(0, 1)
        return FABState(**vars(state), ahead=torch.zeros_like(again), iteration=torch.zeros_like(state.asked))

    def wants_grad(self, state: FABState) -> Tensor:
        return ~state.ahead

    def loss(self, logits: Tensor, state: State) -> Tensor:
        return -margin(logits, state.y) if self.targeted else difference(logits, state.y, state.target)

    def step(self, state: FABState, logits: Tensor, grad: Tensor | None) -> FABState:
        x, here = state.x, state.query
        if grad is None:
            state.ahead = state.iteration >= self.steps
            back = torch.lerp(x, here, self.beta)
            state.query = torch.where(per_slot(state.fooled, x), back, here)
            found = state.ahead & state.best_distance.isfinite()
            if bool(found.any()):
                state.query = torch.where(per_slot(found, x), self._nearer(state), state.query)
        else:
            state.ahead = torch.ones_like(state.ahead)
            state.query = self._ahead(x, here, self.loss(logits, state), grad)
        state.iteration = state.iteration + state.ahead
        return state

    def _nearer(self, state: FABState) -> Tensor:
        """The next point of the search at the end."""
        saved = SAVED * 0.5 ** (state.iteration - self.steps).to(state.x.dtype)
        # In linf, values that the box has stopped stay where they are.
        return self.ball.project_(state.best - state.x, state.best_distance * (1 - saved)).add_(state.x)

    def _ahead(self, x: Tensor, here: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        """The next point from `here`, where the loss and its gradient are known."""
        w = grad.flatten(1)
        z = torch.stack([here, x], 1).flatten(2)  # (B, 2, d)
        c = torch.stack([-loss, ((here - x).flatten(1) * w).sum(1) - loss], 1)
        c = torch.where(c == 0, TIE * w.abs().sum(1, keepdim=True), c)  # on the hyperplane, beyond it
        delta = ONTO[self.norm](z, w, c)
        size = self.ball.distance(delta.flatten(0, 1)).view_as(c).clamp_(min=1e-8)
        alpha = (size[:, :1] / size.sum(1, keepdim=True)).clamp_(max=self.alpha_max)
        from_here, from_x = z.add_(delta, alpha=self.eta).unbind(1)
        return from_here.lerp(from_x, alpha).clamp_(0, 1).view_as(x)
