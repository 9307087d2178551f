"""The labelled images that foolbox ships: 20 each of five data sets."""

import hashlib
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from robust.data.images import decode, read_file
from robust.data.labels import set_labels
from robust.data.source import Request, Source
from robust.errors import InputError, unknown
from robust.models import classes, imagenet
from robust.models.classes import counterparts
from robust.models.model import Model, Preprocess

# Names as in foolbox's file names, such as cifar10_07_6.png: the eighth image, of class 6.
CLASSES = {"imagenet": 1000, "cifar10": 10, "cifar100": 100, "mnist": 10, "fashionMNIST": 10}
CLASS_NAMES = {
    "cifar10": classes.CIFAR10,
    "cifar100": classes.CIFAR100,
    "mnist": classes.MNIST,
    "fashionMNIST": classes.FASHION_MNIST,
}


def accepts(spec: str) -> bool:
    return spec.partition(":")[0].lower() == "samples"


def load(request: Request) -> Source:
    """`samples` takes those of the model's classes, `samples:mnist` names them."""
    model = request.model
    _, named, name = request.spec.partition(":")
    name = _resolve(name) if named else _choose(model)
    if model.num_classes != CLASSES[name]:
        raise InputError(
            f"the {name} samples have {CLASSES[name]} classes and {model.name} has {model.num_classes}: "
            "name other data with --data"
        )
    if name == "imagenet" and model.input_size is None:
        raise InputError(f"the imagenet samples differ in size: name that of {model.name} with --input-size")
    files = sorted(_folder().glob(f"{name}_*"))
    whole = _uncropped(model)

    def read(position: int) -> tuple[Tensor, str]:
        raw = read_file(files[position])
        return decode(raw, str(files[position]), whole), hashlib.sha256(raw).hexdigest()

    theirs = [int(re.split(r"[_.]", file.name)[2]) for file in files]
    labels = set_labels(theirs, _known_as(name), model, f"the {name} samples")
    class_names = imagenet.class_names() if name == "imagenet" else CLASS_NAMES[name]
    return Source([file.name for file in files], labels, read, model.class_names or class_names)


def _known_as(name: str) -> tuple[str, ...]:
    return imagenet.names_and_wnids() if name == "imagenet" else CLASS_NAMES[name]


def _resolve(name: str) -> str:
    by_folded = {known.lower(): known for known in CLASSES}
    if name.lower() not in by_folded:
        raise unknown("samples", name, CLASSES)
    return by_folded[name.lower()]


def _choose(model: Model) -> str:
    channels = model.input_size[0] if model.input_size else None
    if model.class_names is not None:
        fitting = [
            name
            for name, count in CLASSES.items()
            if count == model.num_classes and None not in (counterparts(_known_as(name), model.class_names) or ())
        ]
        if len(fitting) == 1:
            return fitting[0]
        if not fitting and model.num_classes in CLASSES.values():
            raise InputError(f"no samples are of the classes of {model.name}: name data with --data")
    match model.num_classes, channels:
        case 1000, _:
            return "imagenet"
        case 100, _:
            return "cifar100"
        case 10, 1:
            return "mnist"
        case 10, 3:
            return "cifar10"
        case 10, None:
            raise InputError(
                f"{model.name} takes images of unknown size, so which samples suit it? "
                "Name them, as in --data samples:cifar10 or --data samples:mnist"
            )
    raise InputError(f"no samples suit the {model.num_classes} classes of {model.name}: name data with --data")


def _uncropped(model: Model) -> Model:
    """The images show their object edge to edge, cropped already: they are resized to the input, no more."""
    if model.input_size is None or model.input_size[1] != model.input_size[2]:
        return replace(model, preprocess=None)
    interpolation = model.preprocess.interpolation if model.preprocess else "bilinear"
    size = model.input_size[1]
    return replace(model, preprocess=Preprocess(size, size, interpolation))


def _folder() -> Path:
    spec = find_spec("foolbox")  # found without importing it, which takes a second
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the samples come with foolbox, which is not installed: pip install foolbox")
    return Path(spec.submodule_search_locations[0]) / "data"
