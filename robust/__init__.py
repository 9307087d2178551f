"""Adversarial robustness testing for image classifiers.

`python -m robust.evaluate` on the command line; `robust.run` and `robust.load` in Python. Names are imported when first
used, so that the command line answers --help without loading torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust.api import Run, load, run
    from robust.errors import InputError

__all__ = ["InputError", "Run", "load", "run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("Run", "load", "run"):
        from robust import api

        return getattr(api, name)
    if name == "InputError":
        from robust.errors import InputError

        return InputError
    raise AttributeError(f"module 'robust' has no attribute {name!r}")
