"""PGD: projected gradient ascent from a random start. Madry et al. 2018, arXiv 1706.06083."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attacks.attack import CrossEntropyAttack, State
from attacks.noise import Noise
from attacks.norms import per_slot


@dataclass(frozen=True, kw_only=True)
class PGD(CrossEntropyAttack):
    """`steps` steps along the steepest direction, each projected onto the ball and the box.

    steps: at least 1; every start and iterate is judged, the last one included.
    step_size: as a fraction of eps; None for 4 / steps, which crosses the ball twice from side to side
        (eps / 10 at 40 steps).
    random_start: begin at a uniform point of the ball, or at the clean image, where every restart would be the same.

    Costs steps + 1 forwards and `steps` gradients on a sample that stands.
    """

    name: ClassVar[str] = "pgd"
    source: ClassVar[str] = "arXiv 1706.06083"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    steps: int = 40
    step_size: float | None = None
    random_start: bool = True

    @property
    def queries(self) -> int:
        return self.steps + 1

    def init(self, state: State, noise: Noise) -> State:
        if self.random_start:
            state.query = self.ball.random(noise, state.eps).add_(state.x).clamp_(0, 1)
        return state

    def step(self, state: State, logits: Tensor, grad: Tensor) -> State:
        size = state.eps * (4 / self.steps if self.step_size is None else self.step_size)
        delta = state.query.addcmul_(self.ball.steepest_(grad), per_slot(size, grad)).sub_(state.x)
        state.query = self.ball.project_(delta, state.eps).add_(state.x).clamp_(0, 1)
        return state
