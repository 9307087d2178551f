"""`--conv scratch`: the model under test on the project's own convolution, to reach a verdict a second time."""

from dataclasses import replace

from torch import Tensor

from robust.conv.convert import NotConverted, convert
from robust.errors import InputError
from robust.models.model import Model
from robust.models.prepare import difference


def from_scratch(model: Model, x: Tensor) -> Model:
    """`model` with every convolution, batch-norm, pooling and linear layer replaced; x, (N, C, H, W), to try it on.

    It goes by the same name and fingerprint: the weights are the same. InputError where a layer cannot be replaced, or
    the result does not agree with the model on x.
    """
    try:
        converted = convert(model.module, x, strict=True)
    except NotConverted as error:
        raise InputError(f"{model.name} cannot run on the project's convolution: {error}; use --conv torch") from None
    if fault := difference(converted.module, model.module, x):
        raise InputError(
            f"{model.name} does not come out the same on the project's convolution ({fault}); use --conv torch, and "
            "python -m robust.verify to see where they part"
        )
    source = f"{model.source}; on the project's own convolution ({converted.summary()})"
    return replace(model, module=converted.module, source=source)
