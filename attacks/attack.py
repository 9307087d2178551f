"""What an attack is: it names points, and is told what the model said there. It never calls the model.

That one inversion lets the engine run any attack over any mix of samples, radii and restarts in full batches,
count every evaluation, and judge every point.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

from attacks.noise import Noise
from attacks.norms import NORMS, Norm


@dataclass
class State:
    """What an attack knows, row b of every tensor belonging to slot b. Attacks that remember more subclass it."""

    x: Tensor  # (B, C, H, W) clean images
    y: Tensor  # (B,) the labels to leave or, when targeted, to reach
    eps: Tensor  # (B,) radius
    query: Tensor  # (B, C, H, W) the point that the attack asks about next

    def __getitem__(self, rows: Tensor) -> Self:
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


S = TypeVar("S", bound=State)


def cat(first: S, second: S) -> S:
    """The slots of both."""
    pairs = {field.name: (getattr(first, field.name), getattr(second, field.name)) for field in fields(first)}
    return type(first)(**{name: torch.cat(pair) for name, pair in pairs.items()})


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Hyperparameters of an attack, and its arithmetic on a batch of independent slots.

    norm: "linf" or "l2".
    targeted: reach the given label, rather than leave it.
    restarts: how often to begin anew, each time from other noise, on samples still standing.
    """

    norm: str
    targeted: bool = False
    restarts: int = 1

    name: ClassVar[str]
    source: ClassVar[str]  # the paper
    norms: ClassVar[tuple[str, ...]]
    budget: ClassVar[Literal["fixed", "minimal"]] = "fixed"  # stays inside eps, or looks for the least distance
    needs_grad: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.norm not in self.norms:
            raise ValueError(f"{self.name} has no norm {self.norm!r}; it has {', '.join(self.norms)}")
        if self.restarts < 1:
            raise ValueError(f"restarts must be at least 1, not {self.restarts}")

    @property
    def ball(self) -> Norm:
        return NORMS[self.norm]

    @property
    @abstractmethod
    def queries(self) -> int:
        """How many points one run asks about, the first and the last included."""

    @abstractmethod
    def init(self, x: Tensor, y: Tensor, eps: Tensor, noise: Noise) -> State:
        """Begin on clean images x (B, C, H, W) in [0, 1]; the first query is the first point judged."""

    def loss(self, logits: Tensor, state: State) -> Tensor:
        """(B,): what the gradient given to `step` is taken of."""
        raise TypeError(f"{self.name} asks for no gradient")

    def step(self, state: State, logits: Tensor, grad: Tensor | None) -> State:
        """Move `query` on, knowing the logits (B, K) and the gradient (B, C, H, W) of the loss there.

        May overwrite the state and the gradient.
        """
        raise TypeError(f"{self.name} asks about one point only")


@dataclass(frozen=True)
class Task:
    """One sample to attack."""

    position: int  # the caller's own number, handed back
    key: int  # of the sample's noise
    x: Tensor  # (C, H, W) in [0, 1]
    y: int  # the label to leave or, when targeted, to reach


@dataclass(frozen=True)
class Outcome:
    """What an attack claims about one sample; nothing here has been verified.

    `rung` is the index of the smallest eps at which it found an adversarial, None where it found none.
    `x_adv` is that adversarial, or else the last point it asked about. `forwards` and `gradients` are the
    evaluations made on each rung of the eps ladder: points judged, and gradients the attack went on from.
    """

    position: int
    x_adv: Tensor  # (C, H, W)
    rung: int | None
    restart: int | None
    forwards: tuple[int, ...]
    gradients: tuple[int, ...]
