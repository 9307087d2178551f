"""Which class a name means: a class name of the model, one of its synonyms, or a WordNet id."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from robust.data import classes
from robust.errors import InputError, unknown
from robust.models import imagenet
from robust.models.model import Model

WNID = re.compile(r"n\d{8}")


class ClassIndex:
    """Looks names up among a model's classes.

    Case, hyphens and underscores do not matter unless they tell two classes apart (ImageNet has a "Cardigan", a
    dog, and a "cardigan"). A name may be a list of synonyms, "giant panda, panda, coon bear"; the whole of one
    class's name goes before a synonym of another's.
    """

    def __init__(self, model: Model):
        self._exact: defaultdict[str, set[int]] = defaultdict(set)
        self._folded: defaultdict[str, set[int]] = defaultdict(set)
        self._synonyms: defaultdict[str, set[int]] = defaultdict(set)
        for index, name in enumerate(model.class_names or ()):
            self._exact[name].add(index)
            self._folded[_folded(name)].add(index)
            for synonym in name.split(","):
                self._synonyms[_folded(synonym)].add(index)
        self._wnids = {wnid: index for index, wnid in enumerate(wnids_of(model) or ())}

    @property
    def has_wnids(self) -> bool:
        return bool(self._wnids)

    def find(self, name: str) -> list[int]:
        """Every class that the name can mean: none, one, or (an ambiguous name) several."""
        if name in self._exact:
            return sorted(self._exact[name])
        if name in self._wnids:
            return [self._wnids[name]]
        folded = _folded(name)
        return sorted(self._folded.get(folded) or self._synonyms.get(folded) or ())


def wnids_of(model: Model) -> tuple[str, ...] | None:
    """ImageNet's WordNet ids in label order, for a model of its 1000 classes in its order; else None."""
    if model.wnids is None and model.num_classes == imagenet.NUM_CLASSES:
        return imagenet.wnids() if counterparts(imagenet.names_and_wnids(), model) is None else None
    return model.wnids


def set_labels(labels: Sequence[int], names: Sequence[str] | None, model: Model, where: str) -> list[int]:
    """The model's labels for those of a published data set, whose classes `names` names in label order.

    InputError for a class that occurs and that the model does not have, or has twice.
    """
    theirs = counterparts(names, model)
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


def counterparts(names: Sequence[str] | None, model: Model) -> list[int | None] | None:
    """The model's class for each of a published data set's, by name; None for one that it does not have, or has twice.

    None altogether where the classes are the same, in the same order: where the model's have no names, or names that
    are their numbers ("class 0"), or most have those of the set's class of the same index and hardly any has another's.
    """
    if names is None or model.class_names is None:
        return None
    if all(re.sub(r"\D", "", name) == str(label) for label, name in enumerate(model.class_names)):
        return None
    index = ClassIndex(replace(model, wnids=()))  # by names alone
    found = [[index.find(name) for name in _called(known)] for known in names]
    same = [any(label in matches for matches in by_name) for label, by_name in enumerate(found)]
    # By the first of its names that one class has: "giant panda" before "panda", which is the red one too.
    theirs = [next((matches[0] for matches in by_name if len(matches) == 1), None) for by_name in found]
    # Spellings of ImageNet's differ: for some "crane" is the bird, for others the machine.
    moved = sum(match is not None and not stays for match, stays in zip(theirs, same, strict=True))
    return None if 2 * sum(same) >= len(names) >= 10 * moved else theirs


def label_of(name: str, model: Model, option: str = "label") -> int:
    """The class that a person names with --label or another option: by index, name or wnid.

    Where classes are called by numbers, a number is a name.
    """
    numbered = any(known.strip().isdecimal() for known in model.class_names or ())
    if name.isdecimal() and not numbered and int(name) < model.num_classes:
        return int(name)
    matches = ClassIndex(model).find(name)
    if len(matches) > 1:
        raise InputError(f"{option} {name!r} names the classes {_listed(matches)}: give the number of one")
    if not matches and model.class_names is None:
        raise InputError(
            f"{option} {name!r} is no class: {model.name} has no class names, so it is a number, "
            f"0 .. {model.num_classes - 1}"
        )
    if not matches:
        synonyms = [synonym.strip() for known in model.class_names or () for synonym in known.split(",")]
        raise unknown(option, name, [known for known in synonyms if _folded(name) in _folded(known)] or synonyms)
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
    index = ClassIndex(model)
    if any_wnid and model.class_names is None and not index.has_wnids:
        raise InputError(
            f"{where} has folders named by ImageNet wnids, and the {model.num_classes} classes of {model.name} "
            "are not ImageNet's: give a model of its 1000 classes, or name the folders by the model's own"
        )
    found = {folder: index.find(folder) for folder in folders}
    if lost := [folder for folder, matches in found.items() if not matches]:
        raise InputError(
            f"{len(lost)} of the {len(folders)} folders of {where} are no class of {model.name}: "
            f"{_listed(lost)}; name the folders by the model's classes{' or by wnids' if index.has_wnids else ''}"
        )
    for folder, matches in found.items():
        if len(matches) > 1:
            raise InputError(
                f"folder {folder} of {where} is ambiguous: the classes {_listed(matches)} of {model.name} all "
                f"have that name; {'use the wnid' if index.has_wnids else 'rename the classes'}"
            )
    return [matches[0] for matches in found.values()], None


def _alphabetical(folders: Sequence[str], model: Model, where: str) -> tuple[list[int], tuple[str, ...]]:
    if len(folders) != model.num_classes:
        raise InputError(
            f"{where} has {len(folders)} class folders and {model.name} has {model.num_classes} classes without "
            "names: their order cannot be matched; give one folder for each class, empty ones included"
        )
    order = sorted(folders)
    if all(map(str.isdecimal, folders)) and order != sorted(folders, key=int):
        raise InputError(
            f"the folders of {where} are numbers whose alphabetical order ({_listed(order)}) is not that of the "
            "numbers: rename them with leading zeros"
        )
    return [order.index(folder) for folder in folders], tuple(order)


def _called(name: str) -> list[str]:
    """All that a class is called whose name may be a list of synonyms."""
    return [name, *name.split(","), classes.ALSO.get(name, name)]


def _folded(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.strip().casefold()))


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:4])) + (", ..." if len(items) > 4 else "")
