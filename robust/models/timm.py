"""timm's classifiers, by name, each with its own mean, std, input size and crop."""

import re
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from torch import nn

from robust.errors import InputError, unknown
from robust.models.checkpoint import build_with, read_state_dict
from robust.models.download import from_hugging_face, from_torch_hub
from robust.models.imagenet import classifier
from robust.models.model import Model, Preprocess
from robust.models.probe import describe

FILENAMES = ("model.safetensors", "pytorch_model.bin")  # timm's on the hub, the preferred one first


def names() -> list[str]:
    return timm.list_models()


def load(name: str, weights: Path | None, input_size: int | None) -> Model:
    """`name` is an architecture, or architecture.tag for particular weights; without a tag timm's default.

    It may be written as Hugging Face has it, "hf-hub:timm/resnet50.a1_in1k".
    """
    name = re.sub("^(hf[-_]hub:)?timm/", "", name)
    if "/" in name:
        raise InputError(
            f"{name} is none of timm's own networks: write a function file.py:FUNCTION that returns "
            "timm.create_model('hf-hub:OWNER/NAME', pretrained=True) behind its normalisation"
        )
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        raise unknown("timm model", arch, names())
    entries = timm.list_models(f"{arch}.*", pretrained=True)
    if tag and name not in entries:
        raise unknown(f"weights of timm {arch}", name, entries or [arch])
    config: Any = timm.get_pretrained_cfg(name)
    if weights is not None:
        state = read_state_dict(weights)
        net = build_with(lambda num_classes: timm.create_model(name, num_classes=num_classes), state, weights)
    elif config is not None and config.has_weights:
        net = _pretrained(name, config)
    else:
        raise InputError(f"timm has no pretrained weights for {name}: give a file of them with --weights")
    return as_model(name, f"timm {arch}, weights {weights or config.tag}", net, input_size)


def as_model(name: str, source: str, net: nn.Module, input_size: int | None) -> Model:
    """The Model of a network that timm made, by the data configuration that it carries."""
    if net.num_classes == 0:
        raise InputError(f"{name} has no classes: it is a feature extractor, not a classifier")
    config = resolve_data_config({}, model=net)
    (_, crop, width), mode = config["input_size"], config["crop_mode"]
    if crop != width or mode not in ("center", "squash"):
        raise InputError(
            f"{name} takes images of {crop} x {width} pixels, crop mode {mode}, and only squares are prepared here, "
            "by center or squash: wrap it in a factory and give its images as an .npz"
        )
    preprocess = Preprocess(int(crop / config["crop_pct"]), crop, config["interpolation"], squash=mode == "squash")
    return classifier(name, source, net, config["mean"], config["std"], preprocess, input_size)


def _pretrained(name: str, config: Any) -> nn.Module:
    if config.hf_hub_id:
        filenames = (config.hf_hub_filename,) if config.hf_hub_filename else FILENAMES
        path = from_hugging_face(config.hf_hub_id, filenames)
    else:
        path = from_torch_hub(config.url)
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    except Exception as error:  # whatever the readers of its many file formats raise
        raise InputError(f"{path} does not load ({describe(error)}): delete it to download it again") from error
