"""DDN: decoupled direction and norm. Rony et al. 2019, arXiv 1811.09600.

Each step follows a gradient and ends on a sphere that shrinks by the share gamma after an adversarial point and grows
by it after another.

Where this departs from the paper:
- it begins as FMN does, where a linear model has its nearest boundary, and not on the sphere of radius 1, from which
  a distance of 0.01 is out of reach in 100 steps; steps are fractions of the radius, for the same reason;
- it ends as FMN does, in a search between the best point and the image;
- it climbs the margin, whose gradient is at right angles to the boundary; that of the cross-entropy is not, where
  several classes are near;
- images are not rounded to 256 levels: the harness says what rounding costs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.closing import TINY, Closing, ClosingState, alive, check_gamma, schedule, search_radius
from attacks.norms import per_slot


@dataclass(frozen=True, kw_only=True)
class DDN(Closing):
    """`steps` steps: the first tenth of them (10 at most) ask at the start about one wrong class each, the last tenth
    (10 at most) search between the best point and the image.

    steps: at least 1; every point is judged, the start and the last one included.
    gamma: the share by which the radius shrinks and grows, in (0, 1); the paper has 0.05.
    restarts: the first run starts from the image, others from noise about it.

    The first step is half as long as the radius, the last a hundredth of it, along a cosine.
    Costs steps + 1 forwards and `steps` gradients.
    """

    name: ClassVar[str] = "ddn"
    source: ClassVar[str] = "arXiv 1811.09600"
    norms: ClassVar[tuple[str, ...]] = ("l2",)

    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_gamma(self.gamma)

    def _close(self, state: ClosingState, logits: Tensor, grad: Tensor) -> ClosingState:
        fade, turn = schedule(state, self.steps)
        factor = torch.where(state.fooled, 1 - self.gamma, 1 + self.gamma)
        state.radius = factor.mul_(state.radius).minimum(state.farthest)
        size = (0.01 + 0.49 * fade) * state.radius
        ahead = self.ball.steepest_(alive(grad, state.direction)).mul_(per_slot(size, grad))
        searching = turn >= 0
        delta = torch.where(per_slot(searching, grad), state.best, ahead.add_(state.query)).sub_(state.x)
        radius = torch.where(searching, search_radius(state, turn), state.radius)
        delta.mul_(per_slot(radius / self.ball.distance(delta).clamp(min=TINY), delta))
        state.query = delta.add_(state.x).clamp_(0, 1)
        return state
