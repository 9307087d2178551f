"""torchvision's classification sets by name, their test split (val where that is the labelled one).

Nothing is downloaded. torchvision looks for the files under --data-root, in the layout that its download=True
makes.
"""

import hashlib
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from robust.data.images import decode, pixels, read_file
from robust.data.labels import folder_labels, set_labels
from robust.data.source import Request, Source, row_ids
from robust.errors import InputError
from robust.files import at_home
from robust.models import classes
from robust.models.model import Model
from robust.models.probe import describe


class Set(NamedTuple):
    cls: str  # in torchvision.datasets
    split: dict[str, Any]
    num_classes: int
    labels: str = ""  # the attribute with the labels, of a set that is held in memory whole
    class_names: tuple[str, ...] | None = None
    of_imagenet: bool = False  # classes of ImageNet's, in folders named by wnids


TEST, VAL, NOT_TRAIN = {"split": "test"}, {"split": "val"}, {"train": False}
SETS = {
    # Arrays
    "cifar10": Set("CIFAR10", NOT_TRAIN, 10, "targets", classes.CIFAR10),
    "cifar100": Set("CIFAR100", NOT_TRAIN, 100, "targets", classes.CIFAR100),
    "fashionmnist": Set("FashionMNIST", NOT_TRAIN, 10, "targets", classes.FASHION_MNIST),
    "kmnist": Set("KMNIST", NOT_TRAIN, 10, "targets"),
    "mnist": Set("MNIST", NOT_TRAIN, 10, "targets", classes.MNIST),
    "stl10": Set("STL10", TEST, 10, "labels"),
    "svhn": Set("SVHN", TEST, 10, "labels", classes.MNIST),
    "usps": Set("USPS", NOT_TRAIN, 10, "targets", classes.MNIST),
    # Image files
    "country211": Set("Country211", TEST, 211),
    "dtd": Set("DTD", TEST, 47),
    "fgvcaircraft": Set("FGVCAircraft", TEST, 100),
    "flowers102": Set("Flowers102", TEST, 102),
    "food101": Set("Food101", TEST, 101),
    "imagenet": Set("ImageNet", VAL, 1000, of_imagenet=True),
    "imagenette": Set("Imagenette", VAL, 10, of_imagenet=True),
    "places365": Set("Places365", VAL, 365),
}


def accepts(spec: str) -> bool:
    return spec.lower() in SETS


def load(request: Request) -> Source:
    name, model = request.spec.lower(), request.model
    entry = SETS[name]
    if model.num_classes != entry.num_classes and not (entry.of_imagenet and model.wnids):
        raise InputError(f"{name} has {entry.num_classes} classes and {model.name} has {model.num_classes}")
    if request.data_root is None:
        raise InputError(
            f"{name} is a data set of torchvision: name the folder that holds it with --data-root "
            f"(an image folder of this name is ./{name})"
        )
    root = at_home(request.data_root)
    held = _open(entry, root)
    return _in_memory(held, entry, model) if entry.labels else _in_files(held, entry, root, model)


def _open(entry: Set, root: Path) -> Any:
    import torchvision.datasets

    cls = getattr(torchvision.datasets, entry.cls)
    # In place of a loader, str leaves an image file's path: the file is decoded here, as any other is.
    loader = {} if entry.labels else {"loader": str}
    try:
        return cls(root, **entry.split, **loader)
    except Exception as error:  # of broken files, whatever torchvision and its readers stumble on
        reason = describe(error).partition(" You can ")[0].rstrip(".")
        way = f"see torchvision's documentation of {entry.cls}, or give a folder of its images: --data DIR"
        if "download" in signature(cls).parameters:
            way = f"torchvision.datasets.{entry.cls}({str(root)!r}, download=True) fetches it"
        raise InputError(f"there is no readable {entry.cls} under --data-root {root} ({reason}); {way}") from None


def _in_memory(held: Any, entry: Set, model: Model) -> Source:
    def read(row: int) -> tuple[Tensor, str]:
        image, _ = held[row]
        return pixels(image, f"{entry.cls}[{row}]", model), hashlib.sha256(image.tobytes()).hexdigest()

    names = entry.class_names or _class_names(held)
    given = [int(label) for label in getattr(held, entry.labels)]
    if len(given) != len(held):
        raise InputError(f"{entry.cls} has {len(held)} images and {len(given)} labels: download it again")
    labels = set_labels(given, names, model, entry.cls)
    return Source(row_ids(len(held)), labels, read, model.class_names or names)


def _in_files(held: Any, entry: Set, root: Path, model: Model) -> Source:
    pairs = [held[position] for position in range(len(held))]
    paths = [Path(path) for path, _ in pairs]

    def read(position: int) -> tuple[Tensor, str]:
        raw = read_file(paths[position])
        return decode(raw, str(paths[position]), model), hashlib.sha256(raw).hexdigest()

    ids = [path.relative_to(root).as_posix() for path in paths]
    names = _class_names(held)
    labels = _labels([int(label) for _, label in pairs], names, held, entry, model)
    return Source(ids, labels, read, model.class_names or names)


def _labels(given: list[int], names: tuple[str, ...] | None, held: Any, entry: Set, model: Model) -> list[int]:
    """The model's labels for torchvision's, which are ranks among the class folders that are there."""
    wnids = held.wnids if entry.of_imagenet else None
    if wnids and model.wnids:
        index, _ = folder_labels(wnids, model, entry.cls)
        return [index[label] for label in given]
    if names and len(names) != entry.num_classes:
        raise InputError(
            f"{entry.cls} has {len(names)} of its {entry.num_classes} class folders, and torchvision labels them by "
            "their order: download it whole, or give the folder that holds the class folders: --data DIR"
        )
    known_as = names and tuple(map(", ".join, zip(names, wnids or names, strict=True)))
    return set_labels(given, known_as, model, entry.cls)


def _class_names(held: Any) -> tuple[str, ...] | None:
    names = getattr(held, "classes", ())
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names) or None
