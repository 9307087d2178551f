"""Attack algorithms on tensors. They name points and are told what the model says there; `run` does the asking."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from attacks import engine
from attacks.attack import Attack, Outcome, Task
from attacks.fgsm import FGSM
from attacks.foolbox import PREFIX, AttackFailed, FoolboxAttack, foolbox_attacks
from attacks.norms import NORMS
from attacks.pgd import PGD
from attacks.uniform import UniformNoise

__all__ = [
    "ATTACKS",
    "NORMS",
    "Attack",
    "AttackFailed",
    "FoolboxAttack",
    "Outcome",
    "Task",
    "make",
    "names",
    "run",
]

ATTACKS: dict[str, type[Attack]] = {
    "fgsm": FGSM,
    "pgd": PGD,
    "noise": UniformNoise,
}


def names() -> list[str]:
    """Every attack that `make` knows."""
    return [*ATTACKS, *foolbox_attacks()]


def make(name: str, norm: str, targeted: bool = False, **options: Any) -> Attack | FoolboxAttack:
    """The attack called `name` with those of the options that it has; None stands for its own default.

    KeyError for an unknown name, ValueError for an option that it cannot take.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if name.startswith(PREFIX):
        return FoolboxAttack.of(name, norm, targeted, given)
    kind = ATTACKS[name]
    known = {field.name for field in fields(kind)}
    return kind(norm=norm, targeted=targeted, **{key: given[key] for key in given if key in known})


def run(
    model: nn.Module,
    attack: Attack | FoolboxAttack,
    tasks: Iterable[Task],
    eps: Sequence[float],
    *,
    slots: int,
    seed: int,
) -> Iterator[Outcome]:
    """Attack every task up the rising ladder `eps`, in batches of at most `slots`; see `engine.run`."""
    if isinstance(attack, FoolboxAttack):
        return attack.run(model, tasks, eps, slots=slots, seed=seed)
    return engine.run(model, attack, tasks, eps, slots=slots, seed=seed)
