"""What a network takes and gives, found out by asking it: two noise images in, (2, classes) finite logits out."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from attacks.generators import put_back
from robust.errors import InputError

Size = tuple[int, int, int]  # (C, H, W)

CIFAR: Size = (3, 32, 32)
MNIST: Size = (1, 28, 28)
IMAGENET: Size = (3, 224, 224)

FLAT = 50.0  # e^-50 of the likeliest class is nothing
NEAR = 1e-3  # of logits that lie closer together than this share of their size, what counts is that


def count_classes(module: nn.Module, size: Size) -> int:
    """The number of classes of `module`, which is in eval mode, on (2, *size) pixels.

    InputError where it raises, or gives anything but finite (2, classes) logits for two classes or more.
    """
    check_parameters(module)
    try:
        with torch.no_grad(), put_back():  # the network may be random
            logits = module(_noise(module, size))
        fault = _fault(logits)
    except Exception as error:  # a user's network may raise anything
        if dtype := _other_dtype(module, size):
            raise _NoClassifier(
                f"the model's weights are {dtype} and it fails on images, which are float32; call .float() on it, or "
                f"let its forward begin with x = x.to(torch.{dtype})"
            ) from error
        raise InputError(f"the model fails on {_written(size)} images: {describe(error)}") from error
    if fault:
        raise _NoClassifier(f"on {_written(size)} images the model {fault}")
    if len(logits) != 2 or logits.shape[1] < 2:
        raise InputError(
            f"on {_written(size)} images the model returns shape {tuple(logits.shape)} for 2 images, "
            "not logits of shape (2, classes), classes >= 2"
        )
    return logits.shape[1]


def _noise(module: nn.Module, size: Size) -> Tensor:
    """Two images of noise, where the module is."""
    seeded = torch.Generator().manual_seed(0)
    return torch.rand(2, *size, generator=seeded, device="cpu", dtype=torch.float32).to(device_of(module))


def _other_dtype(module: nn.Module, size: Size) -> str | None:
    """That of the module's weights, where it takes images of that dtype; None where they are float32 as images are."""
    dtype = next((each.dtype for each in module.parameters() if each.is_floating_point()), torch.float32)
    if dtype == torch.float32:
        return None
    try:
        with torch.no_grad(), put_back():
            module(_noise(module, size).to(dtype))
    except Exception:  # then it is not that, or not that alone
        return None
    return str(dtype).removeprefix("torch.")


def device_of(module: nn.Module) -> torch.device:
    """Where the module's tensors are, by the first; the CPU where it has none."""
    return next(chain(module.parameters(), module.buffers()), torch.empty(0, device="cpu")).device


def check_parameters(module: nn.Module) -> None:
    """InputError for parameters that are not there yet, or that no gradient can be taken past."""
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            raise InputError(f"the model's {name} is not initialised; call the model once on a batch first")
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise InputError(f"the model's parameter {name} is on the meta device, without values; load weights first")
        if parameter.is_inference():
            raise InputError(f"the model's parameter {name} was made under torch.inference_mode; make it outside")


class _NoClassifier(InputError):
    """What images of another size would not mend."""


def first_accepted(module: nn.Module, sizes: Iterable[Size]) -> tuple[Size, int]:
    """The first of the sizes that the module takes, and its number of classes; InputError where it takes none."""
    failures = []
    for size in sizes:
        try:
            return size, count_classes(module, size)
        except _NoClassifier:
            raise
        except InputError as error:
            failures.append(str(error))
    if len(set(failures)) == 1:  # it is not the size
        raise InputError(failures[0])
    raise InputError(
        f"{'; '.join(failures)}; where it wants another size, give --input-size, or set input_size = (C, H, W) "
        "on the module"
    )


def find_input_size(module: nn.Module) -> tuple[Size | None, int]:
    """The input size that a network gives away, else None, and its number of classes.

    1000 classes on images of 224 px are ImageNet's, and 10 or 100 on colour images of 32 px are CIFAR's; a
    network that takes one channel only is given MNIST's size. Many others take any size, and are not guessed.
    """
    size, classes = first_accepted(module, (CIFAR, MNIST, IMAGENET))
    if classes == 1000 and size == CIFAR:
        try:
            return IMAGENET, count_classes(module, IMAGENET)
        except InputError:
            return None, classes
    telling = {CIFAR: classes in (10, 100), MNIST: True, IMAGENET: classes == 1000}
    return (size if telling[size] else None), classes


def describe(error: BaseException) -> str:
    """An exception as one short line: its type and the beginning of its message."""
    message = " ".join(str(error).split())
    if len(message) > 300:
        message = f"{message[:300]} ..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def apart(logits: Tensor, others: Tensor) -> float:
    """How far two outputs (N, K) for the same images lie from each other, as a share of the largest logit.

    Each row is taken from its largest value, down to FLAT below that: a softmax sees no more, and beside a class that
    is masked by -1e9 any difference would be a small share. Rows whose logits are all alike differ by rounding only,
    which is a share of the logits as they are.
    """
    logits, others = logits.float(), others.float()
    a, b = ((rows - rows.amax(1, keepdim=True)).clamp(min=-FLAT) for rows in (logits, others))
    seen = a > -FLAT
    spread, size = (rows.where(seen, 0).abs().max() for rows in (a, logits))
    return float((a - b).abs().max() / torch.maximum(spread, NEAR * size).clamp(min=1e-12))


def _fault(logits: object) -> str | None:
    """What is wrong with the output for two images, whatever their size, or None."""
    if not isinstance(logits, Tensor):
        return (
            f"returns a {type(logits).__name__}, not one tensor of logits, (N, classes); wrap it in a module that "
            "picks them out"
        )
    if logits.ndim != 2:
        return f"returns shape {tuple(logits.shape)} for 2 images, not logits of shape (2, classes)"
    if not logits.is_floating_point():
        return f"returns {str(logits.dtype).removeprefix('torch.')}, not logits"
    if not logits.isfinite().all():
        return "returns NaN or infinity: check its weights"
    return None


def _written(size: Size) -> str:
    return "x".join(map(str, size))
