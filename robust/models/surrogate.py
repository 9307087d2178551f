"""The network that attack transfer crafts on: seen to take the model's images, and to pass gradients back to them."""

import torch
from torch import nn

from attacks.generators import put_back
from robust.errors import InputError
from robust.models import load_model, memory
from robust.models.model import Model
from robust.models.prepare import frozen
from robust.models.probe import Size, check_parameters, count_classes, describe, device_of
from robust.units import format_size


def load_surrogate(spec: str, input_size: int | None) -> Model:
    """The network that attack transfer crafts on, at the model's own input size if that is one to choose; errors say
    that it is not the model.
    """
    try:
        return load_model(spec, None, input_size)
    except InputError as error:
        raise InputError(f"the surrogate {spec}: {error}") from None


def wrap_surrogate(module: nn.Module, size: Size) -> Model:
    """A module in memory, for images of this size. InputError as of `check_surrogate`."""
    _check_reads(module, type(module).__name__, size)
    return memory.wrap(module, size)


def check_surrogate(surrogate: Model, size: Size) -> None:
    """InputError where the surrogate takes other images than the model's, which are of this size (C, H, W)."""
    if surrogate.input_size is not None and size != surrogate.input_size:
        raise InputError(
            f"the surrogate {surrogate.name} takes {format_size(surrogate.input_size)} and the model's images are "
            f"{format_size(size)}: name one of the same input size, or one for both by --input-size"
        )
    _check_reads(surrogate.module, surrogate.name, size)


def _check_reads(surrogate: nn.Module, name: str, size: Size) -> None:
    """InputError where the surrogate cannot read images of this size (C, H, W), or gives no gradient at them."""
    try:
        check_parameters(surrogate)
    except InputError as error:
        raise InputError(f"the surrogate {name}: {error}") from None
    with frozen(surrogate):
        try:
            count_classes(surrogate, size)
        except InputError:
            raise InputError(
                f"the surrogate {name} cannot read the model's images, {format_size(size)}; name one of the same input "
                "size"
            ) from None
        try:
            with put_back(), torch.enable_grad():
                x = torch.rand(2, *size, device=device_of(surrogate)).requires_grad_()
                passes = surrogate(x).requires_grad
        except Exception as error:  # a user's network may raise anything
            raise InputError(f"the surrogate {name} fails where gradients are asked for: {describe(error)}") from error
    if not passes:
        raise InputError(f"the surrogate {name} passes no gradient to its input; name one that does")
