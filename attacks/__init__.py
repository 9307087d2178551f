"""Attack algorithms on tensors. They name points and are told what the model says there; `run` does the asking."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from inspect import signature
from typing import Any

from torch import nn

from attacks import autoattack, engine
from attacks.apgd import APGDCE, APGDDLR, APGDT
from attacks.attack import Attack, Outcome, Task
from attacks.autoattack import ENSEMBLES, Ensemble
from attacks.ddn import DDN
from attacks.fab import FAB
from attacks.fgsm import FGSM
from attacks.fmn import FMN
from attacks.foolbox import OPTIONS as OF_FOOLBOX
from attacks.foolbox import PREFIX, AttackFailed, FoolboxAttack, foolbox_attacks
from attacks.mifgsm import MIFGSM
from attacks.norms import NORMS
from attacks.pgd import PGD
from attacks.sigma_zero import SigmaZero
from attacks.square import Square
from attacks.transfer import Transfer
from attacks.uniform import UniformNoise

__all__ = [
    "ATTACKS",
    "ENSEMBLES",
    "NORMS",
    "OPTIONS",
    "PREFIX",
    "AnyAttack",
    "Attack",
    "AttackFailed",
    "Ensemble",
    "FoolboxAttack",
    "Outcome",
    "Task",
    "make",
    "names",
    "run",
    "takes",
]

OPTIONS = ("steps", "step_size", "restarts", "random_start", "queries")  # that a run gives to those that take them

ATTACKS: dict[str, type[Attack]] = {
    "fgsm": FGSM,
    "pgd": PGD,
    "mi-fgsm": MIFGSM,
    "apgd-ce": APGDCE,
    "apgd-dlr": APGDDLR,
    "apgd-t": APGDT,
    "fab-t": FAB,
    "square": Square,
    "fmn": FMN,
    "ddn": DDN,
    "sigma-zero": SigmaZero,
    "transfer": Transfer,
    "noise": UniformNoise,
}

AnyAttack = Attack | Ensemble | FoolboxAttack


def names() -> list[str]:
    """Every attack that `make` knows."""
    return [*ENSEMBLES, *ATTACKS, *foolbox_attacks()]


def takes(name: str, random_start: bool | None = None) -> tuple[str, ...]:
    """Those of OPTIONS that mean something to the attack called `name`. KeyError for an unknown name.

    random_start: as the attack is told; one that begins at the image would only repeat itself, and has no restarts.
    """
    if name in ENSEMBLES:
        return ()  # the standards are exact
    if name.startswith(PREFIX):
        parameters = signature(foolbox_attacks()[name]).parameters
        known = {"restarts", *(ours for ours, theirs in OF_FOOLBOX.items() if theirs in parameters)}
    else:
        known = {field.name for field in fields(ATTACKS[name]) if field.init}
    if random_start is False and "random_start" in known:
        known.remove("restarts")
    return tuple(option for option in OPTIONS if option in known)


def make(
    name: str,
    norm: str,
    targeted: bool = False,
    classes: int | None = None,
    surrogate: nn.Module | None = None,
    **options: Any,
) -> AnyAttack:
    """The attack called `name`, told those of the options that it takes.

    classes: how many the model has; None where that is not known yet.
    surrogate: the network that transfer crafts on.
    options: any of OPTIONS; None stands for the attack's own default.

    KeyError for an unknown name, ValueError for an option or a model that it cannot take.
    """
    taken = takes(name, options.get("random_start"))
    given = {option: options[option] for option in taken if options.get(option) is not None}
    if name.startswith(PREFIX):
        return FoolboxAttack.of(name, norm, targeted, given)
    if name in ENSEMBLES:
        if targeted:
            raise ValueError(f"{name} chooses its targets itself; to reach one class use apgd-ce or pgd")
        if norm not in autoattack.NORMS:
            raise ValueError(f"{name} has no norm {norm!r}; it has {', '.join(autoattack.NORMS)}")
        return ENSEMBLES[name](norm, 10 if classes is None else classes)
    kind = ATTACKS[name]
    if classes is not None and classes < kind.least_classes:
        raise ValueError(
            f"{name} needs {kind.least_classes} classes, for the logits in its loss, and the model has {classes}; "
            "use apgd-ce"
        )
    if kind is Transfer:
        if surrogate is None:
            raise ValueError("transfer needs a surrogate to craft on")
        given["surrogate"] = surrogate
    return kind(norm=norm, targeted=targeted, **given)


def run(
    model: nn.Module,
    attack: AnyAttack,
    tasks: Iterable[Task],
    eps: Sequence[float],
    *,
    slots: int,
    seed: int,
    draws: int = 1,
) -> Iterator[Outcome]:
    """Attack every task up the rising ladder `eps`, in batches of at most `slots`; see `engine.run`."""
    if isinstance(attack, Ensemble | FoolboxAttack | Transfer):
        return attack.run(model, tasks, eps, slots=slots, seed=seed, draws=draws)
    return engine.run(model, attack, tasks, eps, slots=slots, seed=seed, draws=draws)
