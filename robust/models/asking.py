"""A user's network, asked: whatever it raises, or returns that is no logits, is told in one line."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from robust.errors import InputError
from robust.models.probe import describe


def logits_of(module: nn.Module, x: Tensor, num_classes: int, name: str = "model") -> Tensor:
    """(N, num_classes) finite logits of a module, in float32 or float64, or InputError, which names it."""
    with torch.no_grad():
        logits = module(x)
    if not isinstance(logits, Tensor) or logits.shape != (len(x), num_classes):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"the {name}'s output must be logits of shape ({len(x)}, {num_classes}), not {shape}; "
            "wrap the model so that it returns one row of logits an image"
        )
    if not bool(logits.isfinite().all()):
        raise InputError(
            f"the {name}'s output holds NaN or infinity; check its weights and the normalisation inside it"
        )
    # Half the digits may tie where all do not. A copy, as a module may write its next output over this one.
    return logits.to(logits.dtype if logits.dtype == torch.float64 else torch.float32, copy=True)


@contextlib.contextmanager
def readable_failure(name: str, where: str, advice: str) -> Iterator[None]:
    """InputError for whatever a user's module raises when it is asked."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"the {name} fails {where}: {describe(error)}; {advice}") from error


class Watched(nn.Module):
    """A module, named where it fails under an attack.

    by_rows: whether attacks/backward.py may take its gradient, which `attacks.evaluation` asks it.
    """

    def __init__(self, name: str, module: nn.Module, by_rows: bool = False):
        super().__init__()
        self.name, self.module, self.by_rows = name, module, by_rows

    def forward(self, x: Tensor) -> Tensor:
        with readable_failure(
            self.name, "under attack", "mend that and begin anew, if need be with a smaller batch_size"
        ):
            return self.module(x)
