"""What an attack is: it names points, and is told what the model said there. It never calls the model.

That one inversion lets the engine run any attack over any mix of samples, radii, targets and restarts in full
batches, count every evaluation, and judge every point.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

from attacks.losses import cross_entropy
from attacks.noise import Noise
from attacks.norms import NORMS, Norm


@dataclass(kw_only=True)
class State:
    """What is known of each slot, row b of every tensor belonging to slot b. Attacks that remember more subclass it."""

    x: Tensor  # (B, C, H, W) clean images
    y: Tensor  # (B,) the labels to leave or, when targeted, to reach
    target: Tensor  # (B,) the class that a targeted loss aims at; y where there is none but y
    eps: Tensor  # (B,) radius
    query: Tensor  # (B, C, H, W) the point that the attack asks about next; at first x
    # Kept by the engine:
    asked: Tensor  # (B,) how many points have been asked about
    graded: Tensor  # (B,) how many gradients it was given
    fooled: Tensor  # (B,) bool: whether the point asked about last is what the attack is after

    def __getitem__(self, rows: Tensor) -> Self:
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(kw_only=True)
class MinimalState(State):
    """Of an attack that looks for the least distance; the engine keeps what it found."""

    best: Tensor  # (B, C, H, W) the nearest adversarial so far; x before there is one
    best_distance: Tensor  # (B,) its distance; infinite before there is one


S = TypeVar("S", bound=State)


def cat(first: S, second: S) -> S:
    """The slots of both."""
    pairs = {field.name: (getattr(first, field.name), getattr(second, field.name)) for field in fields(first)}
    return type(first)(**{name: torch.cat(pair) for name, pair in pairs.items()})


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Hyperparameters of an attack, and its arithmetic on a batch of independent slots.

    norm: one of `norms`.
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
    least_classes: ClassVar[int] = 2
    targetable: ClassVar[bool] = True
    foresees: ClassVar[bool] = False  # knows its next points, as long as it is told nothing new; see `ahead`

    @classmethod
    def kind(cls) -> str:
        """What it uses of the model and what it minimises, in words."""
        goal = "least distance" if cls.budget == "minimal" else "fixed eps"
        return f"{'gradients' if cls.needs_grad else 'scores'}, {goal}"

    @classmethod
    def cost(cls) -> str:
        """Of a step, in words."""
        return "1 forward, 1 gradient" if cls.needs_grad else "1 forward"

    def __post_init__(self) -> None:
        if self.norm not in self.norms:
            raise ValueError(f"{self.name} has no norm {self.norm!r}; it has {', '.join(self.norms)}")
        if self.targeted and not self.targetable:
            raise ValueError(f"{self.name} chooses its targets itself; to reach one class use apgd-ce or pgd")
        for count in ("restarts", "steps", "n_targets", "queries"):  # of which an attack has some
            if count in vars(self) and vars(self)[count] < 1:
                raise ValueError(f"{count} must be at least 1, not {vars(self)[count]}")

    @property
    def ball(self) -> Norm:
        return NORMS[self.norm]

    @property
    def strays(self) -> bool:
        """Whether it may ask about points outside the ball on its way; only those inside count."""
        return False

    @property
    def targets(self) -> int:
        """How many wrong classes it aims at in turn, likeliest first; 0 for an attack that aims at none."""
        return 0

    @property
    @abstractmethod
    def queries(self) -> int:
        """How many points one run asks about at most, the first and the last included."""

    @property
    def points(self) -> int:
        """How many points the model is asked about at most, of a sample that stands, at one eps."""
        return self.queries * self.restarts * max(1, self.targets)

    @property
    def asks_gradients(self) -> bool:
        """Whether it cannot do without the model's gradients."""
        return self.needs_grad

    def last(self, state: Any) -> Tensor:
        """(B,) bool: whether the present query, counted in `state.asked`, is the last of its run."""
        return state.asked >= self.queries

    def wants_grad(self, state: Any) -> Tensor:
        """(B,) bool: which slots cannot go on without a gradient at the present query.

        Where it says so of some only, the others are judged by a forward alone and step first, without them.
        """
        return torch.full_like(state.fooled, self.needs_grad)

    def init(self, state: Any, noise: Noise) -> State:
        """The state that a run begins in; its first query is the first point judged."""
        return state

    def loss(self, logits: Tensor, state: Any) -> Tensor:
        """(B,): what the gradient given to `step` is taken of."""
        raise TypeError(f"{self.name} asks for no gradient")

    def step(self, state: Any, logits: Tensor, grad: Any) -> State:
        """Move `query` on, knowing the logits (B, K) and the gradient (B, C, H, W) of the loss there.

        May overwrite the state and the gradient, which is None where no slot wants it.
        """
        raise TypeError(f"{self.name} asks about one point only")

    def ahead(self, state: Any, n: int) -> dict[str, Tensor]:
        """What changes of the state over the next n points, the present one first, if none before it tells anything:
        its fields as (B, n, ...), `query` among them.
        """
        raise TypeError(f"{self.name} does not know its next points")

    def tells(self, state: Any, ahead: dict[str, Tensor], logits: Tensor) -> Tensor:
        """(B, n) bool: which of the points ahead tell anything, the model saying logits (B, n, K), or are the last."""
        raise TypeError(f"{self.name} does not know its next points")

    def fools(self, pred: Tensor, state: State) -> Tensor:
        """(B,) bool: whether these predicted classes (B,) are what the attack is after."""
        return pred == state.y if self.targeted else pred != state.y


@dataclass(frozen=True, kw_only=True)
class CrossEntropyAttack(Attack):
    """One that raises the cross-entropy of the label or, when targeted, lowers it."""

    def loss(self, logits: Tensor, state: State) -> Tensor:
        loss = cross_entropy(logits, state.y)
        return -loss if self.targeted else loss


@dataclass(frozen=True)
class Task:
    """One sample to attack."""

    position: int  # the caller's own number, handed back
    key: int  # of the sample's noise
    x: Tensor  # (C, H, W) in [0, 1]
    y: int  # the label to leave or, when targeted, to reach
    rungs: int | None = None  # climb only so many of the smallest eps: it is broken already at the others
    first: int = 0  # the rung to begin on


@dataclass(frozen=True)
class Outcome:
    """What an attack claims about one sample; nothing here has been verified.

    `rung` is the index of the smallest eps within which it found an adversarial, None where it found none there.
    `found` says that `x_adv` is claimed to be adversarial: within that eps or, of an attack on the least
    distance, at any distance; else it is the last point asked about (of an attack on the least distance, the image).
    `restart` says in which of its runs (the restarts for each target in turn, from 0) it was found, `component` by
    which part of an ensemble. `forwards` and `gradients` are the evaluations made on each rung of the eps ladder:
    points judged, and gradients the attack went on from; those of an attack on the least distance, which serve every
    rung, count on the first.
    """

    position: int
    x_adv: Tensor  # (C, H, W)
    found: bool
    rung: int | None
    restart: int | None
    forwards: tuple[int, ...]
    gradients: tuple[int, ...]
    component: str | None = None
