"""Uniform noise: the control. What an attack finds beyond it is owed to the gradient and not to the size."""

from dataclasses import dataclass
from typing import ClassVar

from attacks.attack import Attack, State
from attacks.noise import Noise


@dataclass(frozen=True, kw_only=True)
class UniformNoise(Attack):
    """Points drawn uniformly from the ball and clipped to [0, 1], one for each of the restarts.

    Costs 1 forward each.
    """

    name: ClassVar[str] = "noise"
    source: ClassVar[str] = "control"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    needs_grad: ClassVar[bool] = False
    queries: ClassVar[int] = 1

    @classmethod
    def kind(cls) -> str:
        return "control, random"

    def init(self, state: State, noise: Noise) -> State:
        state.query = self.ball.random(noise, state.eps).add_(state.x).clamp_(0, 1)
        return state
