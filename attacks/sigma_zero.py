"""σ-zero: as few changed values as possible. Cinà et al. 2025, arXiv 2402.01879.

Adam descends on the margin that is left plus a smooth count of the changed values, and what has changed by less than
a threshold is put back after each step. The threshold rises after an adversarial point and falls after another.

Where this departs from the paper:
- the first steps look, as FMN's do, where a linear model has its boundary with each of the likeliest wrong classes; the
  nearest is asked about, and Adam begins at the image with its gradient, or with noise where none lies in the box;
- the last steps leave out values of the best point, the smallest first.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.attack import MinimalState
from attacks.closing import Closing, ClosingState, alive, schedule, thinned
from attacks.noise import Noise
from attacks.norms import NORMS, per_slot

DECAY, DECAY_SQUARE = 0.9, 0.999  # of Adam's means


@dataclass(kw_only=True)
class SigmaZeroState(ClosingState):
    threshold: Tensor  # (B,)
    mean: Tensor  # (B, C, H, W) of the gradients
    mean_square: Tensor  # (B, C, H, W)
    begin: Tensor  # (B, C, H, W) where Adam does


@dataclass(frozen=True, kw_only=True)
class SigmaZero(Closing):
    """`steps` steps: the first tenth of them (10 at most) ask at the start about one wrong class each, the last tenth
    (10 at most) leave out values of the best point, those between are Adam's.

    steps: at least 1; every point is judged, the start and the last one included.
    step_size: of the first step, in pixels of [0, 1]. It falls to a tenth along a cosine.
    sigma: how smooth the count is: a change of sqrt(sigma) counts half.
    threshold: at first, in pixels of [0, 1].
    threshold_rate: by how much it moves after each step, as a fraction of the step size.
    restarts: the first run starts from the image, others from noise about it.

    Costs steps + 1 forwards and `steps` gradients.
    """

    name: ClassVar[str] = "sigma-zero"
    source: ClassVar[str] = "arXiv 2402.01879"
    norms: ClassVar[tuple[str, ...]] = ("l0",)

    steps: int = 300
    step_size: float = 1.0
    sigma: float = 1e-3
    threshold: float = 0.3
    threshold_rate: float = 0.01

    def init(self, state: MinimalState, noise: Noise) -> SigmaZeroState:
        begun = super().init(state, noise)
        nothing = torch.zeros_like(state.x)
        return SigmaZeroState(
            **vars(begun),
            threshold=torch.full_like(state.eps, self.threshold),
            mean=nothing,
            mean_square=nothing,
            begin=begun.query,
        )

    def _close(self, state: ClosingState, logits: Tensor, grad: Tensor) -> SigmaZeroState:
        assert isinstance(state, SigmaZeroState)
        step = state.asked - self._looks(logits)
        first = step == 1  # from where the looks were, the nearest of which has left its gradient
        fooled = state.fooled & ~first
        # Down what is left of the margin.
        grad = torch.where(per_slot(first, grad), -state.direction, torch.where(per_slot(fooled, grad), 0, -grad))
        state.query = torch.where(per_slot(first, grad), state.begin, state.query)
        delta = state.query - state.x
        # The gradient of the mean over the values of delta² / (delta² + sigma).
        count = delta.mul(2 * self.sigma / delta[0].numel()).div_(delta.square().add_(self.sigma).square_())
        grad = alive(grad.add_(count), -state.direction)
        grad.div_(per_slot(NORMS["linf"].distance(grad), grad))
        state.mean = state.mean.lerp(grad, 1 - DECAY)
        state.mean_square = state.mean_square.mul(DECAY_SQUARE).addcmul_(grad, grad, value=1 - DECAY_SQUARE)
        fade, turn = schedule(state, self.steps)
        size = self.step_size * (0.1 + 0.9 * fade)
        # Both means begin at zero; without that they would be larger by these. In float64, for the last digits of
        # powers in float32 depend on where in memory they are, and so on the company.
        mean_bias, square_bias = (
            per_slot((1 - decay ** step.double()).to(grad.dtype), grad) for decay in (DECAY, DECAY_SQUARE)
        )
        spread = torch.div(state.mean_square, square_bias).sqrt_().add_(1e-8)
        move = torch.div(state.mean, spread).mul_(per_slot(size, grad) / mean_bias)
        delta = (state.query - move).clamp_(0, 1).sub_(state.x)

        drift = torch.where(fooled, self.threshold_rate, -self.threshold_rate) * size
        state.threshold = (state.threshold + drift).clamp(0, 1)
        delta.mul_(delta.abs() >= per_slot(state.threshold, delta))
        fewer = thinned(state.best - state.x, turn)
        delta = torch.where(per_slot(turn >= 0, delta), fewer, delta)
        state.query = delta.add_(state.x).clamp_(0, 1)
        return state
