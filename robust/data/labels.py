"""Which class a name means: a class name of the model, one of its synonyms, or a WordNet id."""

import re
from collections.abc import Sequence

from robust.errors import InputError, unknown
from robust.models import imagenet
from robust.models.classes import ClassIndex, counterparts, folded
from robust.models.model import Model
from robust.units import format_class

WNID = re.compile(r"n\d{8}", re.IGNORECASE)


def set_labels(labels: Sequence[int], names: Sequence[str] | None, model: Model, where: str) -> list[int]:
    """The model's labels for those of a published data set, whose classes `names` names in label order.

    InputError for a class that occurs and that the model does not have, or has twice.
    """
    theirs = counterparts(names, model.class_names)
    if names is None or theirs is None:
        return list(labels)
    found = {label: theirs[label] for label in labels}
    if lost := [names[label] for label, match in found.items() if match is None]:
        raise InputError(
            f"the classes of {where} are not those of {model.name}, which has none, or several, called "
            f"{_listed(lost)}, but {_listed(model.class_names or ())}: give data of its classes, or, if it is only "
            "named otherwise, the network without class_names"
        )
    return [match for label in labels if (match := found[label]) is not None]


def label_of(name: str, model: Model, option: str = "label") -> int:
    """The class that a person names with --label or another option: by index, name or wnid.

    Where classes are called by numbers, a number is a name.
    """
    numbered = any(known.strip().isdecimal() for known in model.class_names or ())
    if name.isdecimal() and not numbered and int(name) < model.num_classes:
        return int(name)
    if re.fullmatch(r"-?\d+", name) and not numbered:
        raise InputError(f"{option} {name} is outside the model's classes, 0 .. {model.num_classes - 1}")
    matches = ClassIndex(model.class_names, model.wnids).find(name)
    if model.wnids:  # to torchvision only the machine is a "crane", and a person may mean the bird
        matches = sorted({*matches, *ClassIndex(imagenet.wordnet_names()).find(name)})
    if len(matches) > 1:
        named = [f"{label} ({format_class(label, model.class_names)})" for label in matches]
        raise InputError(f"{option} {name!r} names the classes {_listed(named)}: give the number of one")
    if not matches and model.class_names is None:
        raise InputError(
            f"{option} {name!r} is no class: {model.name} has no class names, so it is a number, "
            f"0 .. {model.num_classes - 1}"
        )
    if not matches:
        synonyms = [synonym.strip() for known in model.class_names or () for synonym in known.split(",")]
        raise unknown(option, name, [known for known in synonyms if folded(name) in folded(known)] or synonyms)
    return matches[0]


def folder_labels(folders: Sequence[str], model: Model, where: str) -> tuple[list[int], tuple[str, ...] | None]:
    """The label of each class folder, given by name; InputError unless every one has exactly one.

    Wnids give ImageNet's indices, other names those of the model's classes. Where the model has no class
    names, the folders in alphabetical order are 0 .. K-1, and K must be the model's number of classes; then
    they are its class names, the second thing returned.
    """
    any_wnid = any(map(WNID.fullmatch, folders))
    if not any_wnid and model.class_names is None:
        return _alphabetical(folders, model, where)
    index = ClassIndex(model.class_names, model.wnids)
    if any_wnid and model.class_names is None and not model.wnids:
        raise InputError(
            f"{where} has folders named by ImageNet wnids, and the {model.num_classes} classes of {model.name} "
            "are not ImageNet's: give a model of its 1000 classes, or name the folders by the model's own classes, or "
            "these by wnids (class_names)"
        )
    found = {folder: index.find(folder) for folder in folders}
    if lost := [folder for folder, matches in found.items() if not matches]:
        raise InputError(
            f"{len(lost)} of the {len(folders)} folders of {where} are no class of {model.name}: "
            f"{_listed(lost)}; name the folders by the model's classes{' or by wnids' if model.wnids else ''}"
        )
    for folder, matches in found.items():
        if len(matches) > 1:
            raise InputError(
                f"folder {folder} of {where} is ambiguous: the classes {_listed(matches)} of {model.name} all "
                f"have that name; {'use the wnid' if model.wnids else 'rename the classes'}"
            )
    return [matches[0] for matches in found.values()], None


def _alphabetical(folders: Sequence[str], model: Model, where: str) -> tuple[list[int], tuple[str, ...]]:
    if len(folders) != model.num_classes:
        raise InputError(
            f"{where} has {len(folders)} class folders and {model.name} has {model.num_classes} classes without "
            "names: their order cannot be matched; give one folder for each class, empty ones included"
        )
    order = sorted(folders)
    alike = len({re.sub(r"\d+", "", folder) for folder in folders}) == 1  # but for their numbers
    if alike and order != sorted(folders, key=_numbers):
        raise InputError(
            f"the folders of {where} are numbered, and their alphabetical order ({_listed(order)}) is not that of the "
            "numbers: rename them with leading zeros"
        )
    return [order.index(folder) for folder in folders], tuple(order)


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:4])) + (", ..." if len(items) > 4 else "")
