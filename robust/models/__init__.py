"""Models by name: one spec in, one `Model` out, wherever its weights come from. torch is imported on use."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from robust.errors import InputError, unknown
from robust.files import at_home

if TYPE_CHECKING:
    from robust.models.model import Model

SOURCES = {
    "bundled": "robust.models.bundled",  # weights come with the installation
    "torchvision": "robust.models.torchvision",  # resnet50, torchvision:resnet50@IMAGENET1K_V2
    "timm": "robust.models.timm",  # timm:convnext_tiny, timm:convnext_tiny.fb_in22k_ft_in1k
    "python": "robust.models.python",  # path/to/file.py:factory, package.module:factory
}
"""Source name -> the module with its `load(name, weights, input_size) -> Model` and `names() -> list[str]`."""

BARE = ("bundled", "torchvision")  # the sources whose names need no prefix, in order of precedence


def load_model(spec: str, weights: Path | None = None, input_size: int | None = None) -> Model:
    """The model that `spec` names, ready to be given pixels in [0, 1].

    `weights` is a file with a state dict, in place of the source's own weights; `input_size` is the side of
    the square images to test at, in pixels, in place of the model's own. InputError says which names are near
    an unknown one, why weights do not load or cannot be downloaded, or what is wrong with a user's factory.
    """
    if input_size is not None and input_size < 1:
        raise InputError(f"the input size is a number of pixels, at least 1, not {input_size}")
    from attacks.generators import put_back  # late: it imports torch

    # A shell leaves the ~ of --weights=~/FILE, and of what is quoted, to the program.
    source, name = _resolve(os.path.expanduser(spec))
    weights = None if weights is None else at_home(weights)
    with put_back():  # networks are initialised before their weights are loaded
        model = import_module(SOURCES[source]).load(name, weights, input_size)
    # A path says little in a sentence, and differs between machines: a user's network goes by its function.
    return model if source == "python" else replace(model, name=spec)


def list_models() -> dict[str, list[str]]:
    """Source name -> the names it knows; those of timm are written timm:NAME in a spec."""
    catalogue = {source: import_module(module).names() for source, module in SOURCES.items()}
    return {source: names for source, names in catalogue.items() if names}


def _resolve(spec: str) -> tuple[str, str]:
    """The source of a spec, and the name it has there."""
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in SOURCES:
        return prefix, rest
    if colon or spec.endswith(".py"):
        return "python", spec
    for source in BARE:
        if spec.partition("@")[0] in import_module(SOURCES[source]).names():
            return source, spec
    known = [
        name if source in BARE else f"{source}:{name}" for source, names in list_models().items() for name in names
    ]
    hint = "(--list-models lists all classifiers; a file of weights goes to --weights)"
    raise unknown("model", spec, known, hint)
