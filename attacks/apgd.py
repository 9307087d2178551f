"""APGD: PGD with momentum that finds its own step size. Croce & Hein 2020, arXiv 2003.01690.

The step starts at twice the radius. At checkpoints that come ever closer, a slot whose loss rose in too few of the
steps since the last one, or whose best loss has stopped rising, halves its step and goes back to its best point.
In l1 the steps are sparse instead (arXiv 2103.01208): see `apgd_l1`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks import apgd_l1
from attacks.attack import Attack, CrossEntropyAttack, State
from attacks.losses import dlr, targeted_dlr
from attacks.noise import Noise
from attacks.norms import per_slot

MOMENTUM = 0.25
RISES = 0.75  # the share of steps that must have raised the loss


@dataclass(kw_only=True)
class APGDState(State):
    low: Tensor  # (B, C, H, W) the box, in linf cut with the ball
    high: Tensor
    previous: Tensor  # (B, C, H, W) the point before the last step
    last_loss: Tensor  # (B,)
    best: Tensor  # (B, C, H, W) the point of the highest loss so far
    best_loss: Tensor  # (B,)
    best_grad: Tensor  # (B, C, H, W)
    size: Tensor  # (B,) of the next step
    window: Tensor  # (B,) steps from the last checkpoint to the next
    since: Tensor  # (B,) steps made since the last checkpoint
    rises: Tensor  # (B,) how many of them raised the loss
    checked_loss: Tensor  # (B,) the best loss at the last checkpoint
    halved: Tensor  # (B,) bool: whether the step was halved there


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """The search, whatever its loss.

    steps: at least 1; the start, at a random point of the sphere, and every iterate are judged.

    Costs steps + 1 forwards and `steps` gradients on a sample that stands (in l1 two more of each), for each of
    its targets and restarts.
    """

    source: ClassVar[str] = "arXiv 2003.01690"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    steps: int = 100

    @property
    def queries(self) -> int:
        return apgd_l1.queries(self.steps) if self.norm == "l1" else self.steps + 1

    @property
    def strays(self) -> bool:
        return self.norm == "l1"

    def init(self, state: State, noise: Noise) -> State:
        if self.norm == "l1":
            return apgd_l1.init(self.steps, state, noise)
        x, eps, n = state.x, state.eps, len(state.x)
        low, high = torch.zeros_like(x), torch.ones_like(x)
        if self.norm == "linf":
            start = noise.uniform().mul_(2).sub_(1)
            low, high = (x - per_slot(eps, x)).clamp_(min=0), (x + per_slot(eps, x)).clamp_(max=1)
        else:
            start = noise.normal()
        start.mul_(per_slot(eps / self.ball.distance(start).clamp_(min=1e-12), x)).add_(x).clamp_(0, 1)
        nothing = torch.full((n,), -torch.inf, device=x.device)
        zeros = torch.zeros(n, dtype=torch.long, device=x.device)
        known = vars(state) | {"query": start}
        return APGDState(
            **known, low=low, high=high, previous=start, last_loss=-nothing, best=start.clone(), best_loss=nothing,
            best_grad=torch.zeros_like(x), size=2 * eps, window=zeros + max(int(0.22 * self.steps), 1),
            since=zeros, rises=zeros, checked_loss=nothing, halved=torch.ones_like(zeros, dtype=torch.bool),
        )  # fmt: skip

    def step(self, state: State, logits: Tensor, grad: Tensor) -> State:
        loss = self.loss(logits, state)
        if self.norm == "l1":
            return apgd_l1.step(self.steps, state, loss, grad)
        assert isinstance(state, APGDState)
        started = state.asked == 1
        better = (loss > state.best_loss).nonzero().squeeze(1)
        state.best.index_copy_(0, better, state.query[better])
        state.best_grad.index_copy_(0, better, grad[better])
        state.best_loss = state.best_loss.maximum(loss)
        state.checked_loss = torch.where(started, loss, state.checked_loss)
        state.rises = state.rises + (loss > state.last_loss)
        state.since = torch.where(started, 0, state.since + 1)
        state.last_loss = loss
        here = state.query
        due = state.since == state.window
        if bool(due.any()):
            back = self._check(state, due).nonzero().squeeze(1)
            here.index_copy_(0, back, state.best[back])
            grad = grad.index_copy(0, back, state.best_grad[back])

        ahead = self._inside(state, torch.addcmul(here, self.ball.steepest_(grad), per_slot(state.size, grad)))
        first = started.nonzero().squeeze(1)
        plain = ahead[first]
        drift = torch.sub(here, state.previous).add_(here)  # where momentum alone would go
        moved = ahead.lerp_(drift, MOMENTUM).index_copy_(0, first, plain)
        state.query, state.previous = self._inside(state, moved), here
        return state

    def _check(self, state: APGDState, due: Tensor) -> Tensor:
        """Look at the slots whose checkpoint is due; which of them halve their step, (B,) bool."""
        wanders = state.rises <= RISES * state.window
        stalls = ~state.halved & (state.checked_loss >= state.best_loss)
        halve = due & (wanders | stalls)
        shorter = (state.window - max(int(0.03 * self.steps), 1)).clamp_(min=max(int(0.06 * self.steps), 1))
        state.size = torch.where(halve, state.size / 2, state.size)
        state.halved = torch.where(due, halve, state.halved)
        state.checked_loss = torch.where(due, state.best_loss, state.checked_loss)
        state.window = torch.where(due, shorter, state.window)
        state.since, state.rises = (torch.where(due, 0, count) for count in (state.since, state.rises))
        return halve

    def _inside(self, state: APGDState, point: Tensor) -> Tensor:
        """`point`, overwritten, brought into the ball and the box."""
        if self.norm != "linf":
            point = self.ball.project_(point.sub_(state.x), state.eps).add_(state.x)
        return torch.clamp(point, state.low, state.high, out=point)


@dataclass(frozen=True, kw_only=True)
class APGDCE(CrossEntropyAttack, APGD):
    """APGD on the cross-entropy."""

    name: ClassVar[str] = "apgd-ce"


@dataclass(frozen=True, kw_only=True)
class APGDDLR(APGD):
    """APGD on the difference of logits ratio, which does not vanish where a network is sure of itself."""

    name: ClassVar[str] = "apgd-dlr"
    least_classes: ClassVar[int] = 3

    def loss(self, logits: Tensor, state: State) -> Tensor:
        loss = dlr(logits, state.y)
        return -loss if self.targeted else loss


@dataclass(frozen=True, kw_only=True)
class APGDT(APGD):
    """APGD on the targeted difference of logits ratio, towards the likeliest wrong classes in turn.

    n_targets: how many of them, all where there are fewer.
    """

    name: ClassVar[str] = "apgd-t"
    least_classes: ClassVar[int] = 4
    targetable: ClassVar[bool] = False

    n_targets: int = 9

    @property
    def targets(self) -> int:
        return self.n_targets

    def loss(self, logits: Tensor, state: State) -> Tensor:
        return targeted_dlr(logits, state.y, state.target)
