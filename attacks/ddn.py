"""DDN: decoupled direction and norm. Rony et al. 2019, arXiv 1811.09600.

Each step follows the gradient of the cross-entropy and ends on a sphere, 1 at first, that shrinks by the share gamma
after an adversarial point and grows by it after another. Images are not rounded to 256 levels, as the paper does:
the harness says what rounding costs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.attack import Attack, MinimalState
from attacks.fmn import TINY, alive, schedule, search_radius, start
from attacks.losses import cross_entropy
from attacks.noise import Noise
from attacks.norms import per_slot


@dataclass(kw_only=True)
class DDNState(MinimalState):
    radius: Tensor  # (B,)
    farthest: Tensor  # (B,) distance to the farthest corner of the box
    direction: Tensor  # (B, C, H, W) where to go where the gradient is zero


@dataclass(frozen=True, kw_only=True)
class DDN(Attack):
    """`steps` steps, the last tenth of them (10 at most) a search between the best point and the image.

    steps: at least 1; every point is judged, the start and the last one included.
    gamma: the share by which the radius shrinks and grows, in (0, 1).
    restarts: the first run starts from the image, others from noise about it.

    Steps have the l2 length 1 at first, and fall to 0.01 along a cosine.
    Costs steps + 1 forwards and `steps` gradients.
    """

    name: ClassVar[str] = "ddn"
    source: ClassVar[str] = "arXiv 1811.09600"
    norms: ClassVar[tuple[str, ...]] = ("l2",)
    budget: ClassVar[Literal["fixed", "minimal"]] = "minimal"

    steps: int = 100
    gamma: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma must be between 0 and 1, not {self.gamma}")

    @property
    def queries(self) -> int:
        return self.steps + 1

    def init(self, state: MinimalState, noise: Noise) -> DDNState:
        farthest = self.ball.distance(torch.maximum(state.x, 1 - state.x))
        random = noise.normal()
        state.query = start(state, random, noise)
        return DDNState(**vars(state), radius=torch.ones_like(farthest), farthest=farthest, direction=random)

    def loss(self, logits: Tensor, state: MinimalState) -> Tensor:
        loss = cross_entropy(logits, state.y)
        return -loss if self.targeted else loss

    def step(self, state: DDNState, logits: Tensor, grad: Tensor) -> DDNState:
        fade, turn = schedule(state, self.steps)
        fooled = self.fools(logits.argmax(1), state)
        state.radius = torch.where(fooled, 1 - self.gamma, 1 + self.gamma).mul(state.radius).minimum(state.farthest)
        ahead = self.ball.steepest_(alive(grad, state.direction)).mul_(per_slot(0.01 + 0.99 * fade, grad))
        searching = turn >= 0
        delta = torch.where(per_slot(searching, grad), state.best, ahead.add_(state.query)).sub_(state.x)
        radius = torch.where(searching, search_radius(state, turn), state.radius)
        delta.mul_(per_slot(radius / self.ball.distance(delta).clamp(min=TINY), delta))
        state.query = delta.add_(state.x).clamp_(0, 1)
        return state
