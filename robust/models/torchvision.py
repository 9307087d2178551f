"""torchvision's classifiers, by name, with any of their weights entries or a file of weights."""

import re
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from robust.errors import unknown
from robust.models.checkpoint import build_with, read_state_dict
from robust.models.download import from_torch_hub
from robust.models.imagenet import classifier
from robust.models.model import Model, Preprocess

TRANSFORMING = ("googlenet", "inception_v3")  # ImageNet's mean and std to [-1, 1], with transform_input=True


def names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def load(name: str, weights: Path | None, input_size: int | None) -> Model:
    """`name` is a model, or model@ENTRY; without an entry torchvision's DEFAULT is taken.

    The entry gives preprocessing and normalisation and, unless there is a file of `weights`, the weights:
    from torch's cache, downloaded there on first use as torchvision does.
    """
    arch, _, wanted = name.partition("@")
    if arch not in names():
        raise unknown("torchvision classifier", arch, names())
    entries = {
        key: entry
        for key, entry in torchvision.models.get_model_weights(arch).__members__.items()
        if entry.meta["categories"]  # without them it is a backbone, as VGG16's IMAGENET1K_FEATURES is
    }
    entry = entries.get(wanted or "DEFAULT")
    if entry is None:
        raise unknown(f"weights of {arch}", wanted, entries)
    path = weights or from_torch_hub(entry.url)
    state = _renamed(arch, read_state_dict(path))
    net = build_with(lambda num_classes: _build(arch, entry, num_classes), state, path)
    transform = entry.transforms()
    # A checkpoint does not say whether it was trained so.
    assumed = ", inputs in [-1, 1] as for the published ones" if weights and arch in TRANSFORMING else ""
    return classifier(
        name,
        f"torchvision {arch}, weights {weights or entry.name}{assumed}",
        net,
        transform.mean,
        transform.std,
        Preprocess(transform.resize_size[0], transform.crop_size[0], transform.interpolation.value),
        input_size,
    )


def _build(arch: str, entry: Any, num_classes: int | None) -> nn.Module:
    """The network, untrained, as torchvision shapes it for these weights."""
    options: dict[str, Any] = {"num_classes": num_classes or len(entry.meta["categories"])}
    if arch in TRANSFORMING:
        # Their weights want inputs in [-1, 1]; their auxiliary heads serve training only.
        options |= {"transform_input": True, "aux_logits": False, "init_weights": False}
    if arch.startswith("vit_"):
        options |= {"image_size": entry.meta["min_size"][0]}
    return torchvision.models.get_model(arch, weights=None, **options)


def _renamed(arch: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict in the names of today's classes: DenseNet's old ones, no auxiliary heads."""
    for name in list(state):
        if arch in TRANSFORMING and re.search(r"(^|\.)(aux1|aux2|AuxLogits)\.", name):
            del state[name]
        elif arch.startswith("densenet"):
            today = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", name)
            state[today] = state.pop(name)
    return state
