"""MI-FGSM: iterated FGSM with momentum, whose examples transfer well. Dong et al. 2018, arXiv 1710.06081."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attacks.attack import CrossEntropyAttack, State
from attacks.noise import Noise
from attacks.norms import per_slot


@dataclass(kw_only=True)
class MomentumState(State):
    momentum: Tensor  # (B, C, H, W) the gradients so far, each of l1 size 1


@dataclass(frozen=True, kw_only=True)
class MIFGSM(CrossEntropyAttack):
    """`steps` steps of size eps / steps along the gathered gradients, from the clean image.

    steps: at least 1.
    decay: the share of the gathered gradients kept at each step; 0 for iterated FGSM.

    Nothing in it is random, so it has no restarts. Costs steps + 1 forwards and `steps` gradients on a sample that
    stands.
    """

    name: ClassVar[str] = "mi-fgsm"
    source: ClassVar[str] = "arXiv 1710.06081"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    restarts: int = field(default=1, init=False)
    steps: int = 10
    decay: float = 1.0

    @property
    def queries(self) -> int:
        return self.steps + 1

    def init(self, state: State, noise: Noise) -> MomentumState:
        return MomentumState(**vars(state), momentum=torch.zeros_like(state.x))

    def step(self, state: MomentumState, logits: Tensor, grad: Tensor) -> MomentumState:
        size = grad.flatten(1).abs().sum(1).clamp_(min=torch.finfo(grad.dtype).tiny)
        state.momentum = (self.decay * state.momentum).add_(grad.div_(per_slot(size, grad)))
        ahead = self.ball.steepest_(state.momentum.clone()).mul_(per_slot(state.eps / self.steps, grad))
        delta = ahead.add_(state.query).sub_(state.x)
        state.query = self.ball.project_(delta, state.eps).add_(state.x).clamp_(0, 1)
        return state
