"""What all ImageNet classifiers share: the names of the classes, and the way from a network to a Model."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from torch import nn

from robust.models.classes import counterparts
from robust.models.model import Model, Normalize, Preprocess, fingerprint
from robust.models.probe import count_classes

NUM_CLASSES = 1000


@cache
def class_names() -> tuple[str, ...]:
    """The 1000 names in label order, torchvision's: each is unique, where WordNet calls two classes "crane"."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


@cache
def wnids() -> tuple[str, ...]:
    """The 1000 WordNet ids in label order, such as "n02510455", which name ImageNet's folders."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


@cache
def wordnet_names() -> tuple[str, ...]:
    """What WordNet calls each class first, in label order: "crane" twice, the bird and the machine."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(label).partition(",")[0] for label in range(NUM_CLASSES))


def names_and_wnids() -> tuple[str, ...]:
    """Each class's name with its wnid for a synonym, to look classes up by either."""
    return tuple(f"{name}, {wnid}" for name, wnid in zip(class_names(), wnids(), strict=True))


def wnids_of(num_classes: int, names: Sequence[str] | None) -> tuple[str, ...] | None:
    """The wnids of a network of ImageNet's 1000 classes in its order, however `names` spells them; else None."""
    alike = num_classes == NUM_CLASSES and counterparts(names_and_wnids(), names) is None
    return wnids() if alike else None


def usual_preprocess(side: int) -> Preprocess:
    """An eighth of the image is cut off: 256 to 224, as torchvision's first weights have it."""
    return Preprocess(round(side * 256 / 224), side)


def classifier(
    name: str,
    source: str,
    net: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    preprocess: Preprocess,
    input_size: int | None,
) -> Model:
    """The Model of a network that wants (x - mean) / std; with 1000 classes it is taken for one of ImageNet.

    `input_size`, where given, overrides the side of the square that `preprocess` ends with; as much is cut off.
    """
    if input_size is not None:
        resize = round(preprocess.resize * input_size / preprocess.crop)
        preprocess = replace(preprocess, resize=resize, crop=input_size)
    module = nn.Sequential(Normalize(mean, std), net).eval()
    size = (len(mean), preprocess.crop, preprocess.crop)
    num_classes = count_classes(module, size)
    return Model(
        name=name,
        source=source,
        module=module,
        num_classes=num_classes,
        input_size=size,
        preprocess=preprocess,
        class_names=class_names() if num_classes == NUM_CLASSES else None,
        wnids=wnids_of(num_classes, None),
        fingerprint=fingerprint(module),
    )
