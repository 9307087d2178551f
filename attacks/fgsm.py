"""FGSM: one step of the full radius. Goodfellow, Shlens & Szegedy 2015, arXiv 1412.6572."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from attacks.attack import CrossEntropyAttack, State
from attacks.norms import per_slot


@dataclass(frozen=True, kw_only=True)
class FGSM(CrossEntropyAttack):
    """x + eps * sign(grad of the cross-entropy), clipped to [0, 1]; in l2, the normalised gradient.

    Nothing in it is random, so it has no restarts. Costs 2 forwards and 1 gradient a sample.
    """

    name: ClassVar[str] = "fgsm"
    source: ClassVar[str] = "arXiv 1412.6572"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    queries: ClassVar[int] = 2

    restarts: int = field(default=1, init=False)

    def step(self, state: State, logits: Tensor, grad: Tensor) -> State:
        delta = self.ball.steepest_(grad).mul_(per_slot(state.eps, grad))
        state.query = delta.add_(state.x).clamp_(0, 1)
        return state
