"""What every model source makes: one object that takes pixels in [0, 1] and gives logits."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Preprocess:
    """How an image file becomes the model's pixels: shorter side to `resize`, then a centred square `crop`.

    With `squash`, the longer side too: nothing is cut off but what `resize` has more than `crop`.

    Normalisation is not here: it is the first layer of the model, so that eps keeps its unit.
    """

    resize: int
    crop: int
    interpolation: str = "bilinear"  # "nearest" | "bilinear" | "bicubic" | "lanczos", as Pillow names them
    squash: bool = False


class Normalize(nn.Module):
    """(x - mean) / std, channel by channel; x is (N, C, H, W) in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


@dataclass(frozen=True)
class Model:
    """A classifier under test.

    `module` maps (N, C, H, W) float32 pixels in [0, 1] to (N, num_classes) logits and is in eval mode.
    `input_size` is (C, H, W); None where only the data can tell (a user's own network).
    `preprocess` None: images are taken at their own size, which must be `input_size` where that is known.
    `was_training`: the module arrived in train mode, which a careful user wants to hear of.
    `class_names` and `wnids` (ImageNet's) are in label order where the source knows them, else None.
    """

    name: str  # the spec it was loaded by; for a user's own network, its function
    source: str  # one readable phrase: "torchvision resnet50, weights IMAGENET1K_V2"
    module: nn.Module
    num_classes: int
    input_size: tuple[int, int, int] | None = None
    preprocess: Preprocess | None = None
    class_names: tuple[str, ...] | None = None
    wnids: tuple[str, ...] | None = None
    fingerprint: str = ""
    was_training: bool = False


def fingerprint(module: nn.Module, *extra: str) -> str:
    """SHA-256 over every parameter and buffer (name, dtype, shape, bytes), the layer structure, and `extra`."""
    digest = hashlib.sha256()
    layers = (f"{name} {type(part).__name__}({_hyperparameters(part)})" for name, part in module.named_modules())
    for text in (*layers, *extra):
        digest.update(text.encode() + b"\0")
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):  # what a layer saves besides, from get_extra_state
            digest.update(f"{name} {tensor}\0".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def _hyperparameters(layer: nn.Module) -> str:
    """'kernel_size=(3, 3), stride=(1, 1)': of torch's own layers their constants.

    What they print changes by version: torch 2.14 names an argument of batch-norms that 2.11 does not.
    """
    constants = sorted(getattr(layer, "__constants__", None) or ())
    said = [f"{name}={getattr(layer, name, None)}" for name in constants]
    if not constants or not type(layer).extra_repr.__module__.startswith("torch."):
        said.append(layer.extra_repr())
    return ", ".join(said)
