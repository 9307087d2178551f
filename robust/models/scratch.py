"""`--conv scratch`: the model under test on the project's own convolution, to reach a verdict a second time."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from robust.conv.convert import NotConverted, convert
from robust.errors import InputError
from robust.models.model import Model
from robust.models.prepare import difference, frozen, look
from robust.models.probe import describe
from robust.randomness import is_random


def from_scratch(model: Model, x: Tensor, device: torch.device) -> Model:
    """`model` with every convolution, batch-norm, pooling and linear layer replaced, on `device`.

    x, (N, C, H, W) in [0, 1], is what it is tried on, where it will run. It goes by the same name and fingerprint: the
    weights are the same. InputError where a layer cannot be replaced, or the result does not agree with the model; a
    part that cannot be traced may stay as it is, its layers replaced.
    """
    x = x.to(device)
    if len(x) == 1:  # one image hides what is made for a whole batch
        x = torch.cat([x, 1 - x])
    original = copy.deepcopy(model.module).to(device)
    try:
        converted = convert(original, x)
        if converted.missed:
            raise NotConverted(converted.shortfall())
    except NotConverted as error:
        raise InputError(f"{model.name} cannot run on the project's convolution: {error}; use --conv torch") from None
    except Exception as error:  # of code that somebody else wrote
        raise InputError(
            f"{model.name} cannot be put on the project's convolution ({describe(error)}); use --conv torch"
        ) from error
    # No two passes of a random one are the same; `convert` has compared equal draws.
    with frozen(original):
        steady = not is_random(original, x)
        fault = difference(look(converted.module, x), look(original, x)) if steady else None
    if fault:
        raise InputError(
            f"{model.name} does not come out the same on the project's convolution ({fault}); use --conv torch, and "
            "python -m robust.verify to see where they part"
        )
    source = f"{model.source}; on the project's own convolution ({converted.summary()})"
    return replace(model, module=converted.module, source=source)
