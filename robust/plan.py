"""The attacks of a run, made of its options: what is wrong with them is said before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

import attacks
from robust.data.labels import label_of
from robust.device import pick_device
from robust.errors import InputError, unknown
from robust.models.asking import Watched
from robust.models.model import Model
from robust.options import Options
from robust.statistics import CONTROL


@dataclass(frozen=True)
class Plan:
    """The attacks of a run, ready to go."""

    attacks: tuple[attacks.AnyAttack, ...]
    target: int | None  # class index
    device: torch.device
    surrogate: nn.Module | None = None


def check_options(options: Options) -> None:
    """InputError for attacks and options that are wrong whatever the model is, which may take long to load."""
    _attacks(options, None, None if options.surrogate is None else nn.Identity())


def make_plan(
    options: Options, model: Model, class_names: Sequence[str] | None, surrogate: Model | None = None
) -> Plan:
    """Options made concrete for the model; InputError for names that it or this project does not know."""
    device = pick_device(options.device)
    if surrogate is not None and surrogate.num_classes != model.num_classes:
        raise InputError(
            f"the surrogate {surrogate.name} has {surrogate.num_classes} classes and the model {model.num_classes}; "
            "name one trained on the same classes"
        )
    crafted_on = None if surrogate is None else surrogate.module
    watched = None if surrogate is None else Watched(f"surrogate {surrogate.name}", surrogate.module)
    made = _attacks(options, model.num_classes, watched)
    named = replace(model, class_names=tuple(class_names) if class_names else None)
    target = None if options.target is None else label_of(options.target, named, "target")
    return Plan(made, target, device, crafted_on)


def _attacks(options: Options, classes: int | None, surrogate: nn.Module | None) -> tuple[attacks.AnyAttack, ...]:
    told = {option: getattr(options, option) for option in attacks.OPTIONS}
    targeted = options.target is not None
    made = []
    for name in options.attacks:
        try:
            made.append(attacks.make(name, options.norm, targeted, classes, surrogate, **told))
        except KeyError:
            raise unknown("attack", name, attacks.names()) from None
        except ValueError as error:
            raise InputError(str(error)) from None
    _check_taken(options)
    return tuple(made)


def _check_taken(options: Options) -> None:
    """InputError for an option that no attack of the run takes: who gives it expects something of it."""
    for option in attacks.OPTIONS:
        value, default = getattr(options, option), getattr(Options, option)
        if value == default or any(option in attacks.takes(name, options.random_start) for name in options.attacks):
            continue
        takers = [name for name in attacks.names() if option in attacks.takes(name) and name not in options.attacks]
        fit = [name for name in takers if name in attacks.ATTACKS and options.norm in attacks.ATTACKS[name].norms]
        foreign = ["many of foolbox's"] if any(name.startswith(attacks.PREFIX) for name in takers) else []
        could = any(option in attacks.takes(name) for name in options.attacks)
        without = " without a random start" if could else ""
        others = f", or add an attack that takes it: {', '.join(fit + foreign)}" if fit or foreign else ""
        raise InputError(
            f"{option} means nothing to {' or '.join(options.attacks)}{without}: leave it out{others} "
            "(see --list-attacks)"
        )


def is_minimal(attack: attacks.AnyAttack) -> bool:
    """Whether it is one of ours that looks for the least distance, and so answers for every eps at once."""
    return isinstance(attack, attacks.Attack) and attack.budget == "minimal"


def is_spared(attack: attacks.AnyAttack) -> bool:
    """Whether it leaves out what is certified: the control does not, nor what looks for a distance beyond any eps."""
    return attack.name != CONTROL and not is_minimal(attack)
