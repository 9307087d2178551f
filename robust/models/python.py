"""A user's own network: a function in a Python file or module, or an nn.Module at hand."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from torch import nn

from robust.errors import InputError, unknown
from robust.models import imagenet
from robust.models.checkpoint import load_into, read_state_dict
from robust.models.model import Model, Preprocess, fingerprint
from robust.models.prepare import in_training
from robust.models.probe import IMAGENET, Size, describe, find_input_size, first_accepted


def names() -> list[str]:
    return []


def load(name: str, weights: Path | None, input_size: int | None) -> Model:
    """`name` is path/to/file.py:factory or package.module:factory; the factory takes no argument.

    It returns an nn.Module that maps (N, C, H, W) pixels in [0, 1] to (N, classes) logits. The module may
    say more in two attributes: `input_size`, (C, H, W), and `class_names`, in label order.
    """
    place, _, factory = name.rpartition(":")
    if not place or not factory:
        raise InputError(f"{name!r} names no function: write {name.rstrip(':')}:FUNCTION, which returns the model")
    with _siblings_importable(place):
        source = _import(place)
        if not callable(getattr(source, factory, None)):
            functions = [key for key, value in vars(source).items() if inspect.isfunction(value)]
            raise unknown(f"function in {place}", factory, functions)
        try:
            module = getattr(source, factory)()
        except (Exception, SystemExit) as error:  # a user's code may raise anything
            raise InputError(f"{name} raised {describe(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{name} returned a {type(module).__name__}; it must return a torch.nn.Module")
    if weights is not None:
        load_into(module, read_state_dict(weights), weights)
    was_training = in_training(module)
    module.eval()
    size, classes, preprocess = _input(module, input_size)
    class_names = _class_names(module, classes)
    wnids = imagenet.wnids_of(classes, class_names)
    if wnids and size and (size == IMAGENET or input_size is not None):
        preprocess = imagenet.usual_preprocess(size[1])
    digest = hashlib.sha256(Path(source.__file__).read_bytes()).hexdigest() if source.__file__ else ""
    return Model(
        name=factory,
        source=f"{factory} of {place}" + (f", weights {weights}" if weights else ""),
        module=module,
        num_classes=classes,
        input_size=size,
        preprocess=preprocess,
        class_names=class_names or (imagenet.class_names() if wnids else None),
        wnids=wnids,
        fingerprint=fingerprint(module, digest),
        was_training=was_training,
    )


@contextmanager
def _siblings_importable(place: str) -> Iterator[None]:
    """The file's own folder (for a module: the current one) comes first on sys.path, as when it is run."""
    folder = str((Path(place).parent if place.endswith(".py") else Path()).resolve())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code may have taken it away
            sys.path.remove(folder)


def _import(place: str) -> ModuleType:
    """The module at path/to/file.py, under a name that no other module has, or the one that `place` names."""
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve()
        if not path.is_file():
            raise InputError(f"no Python file at {place}")
        name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # which holds for every .py
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError as error:
        if error.name != place.partition(".")[0]:
            raise InputError(f"importing {place} raised {describe(error)}") from error
        raise InputError(
            f"there is no Python module {place!r}; a model is written NAME, torchvision:NAME, timm:NAME, "
            "path/to/file.py:FUNCTION or package.module:FUNCTION"
        ) from error
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        if isinstance(error, InputError):
            raise
        raise InputError(f"importing {place} raised {describe(error)}") from error


def _input(module: nn.Module, side: int | None) -> tuple[Size | None, int, Preprocess | None]:
    """Input size, number of classes and preprocessing; images are only resized to a size that somebody named."""
    declared = _declared_size(module)
    if side is not None:
        channels = declared[:1] if declared else (3, 1)
        size, classes = first_accepted(module, [(c, side, side) for c in channels])
    elif declared is not None:
        size, classes = first_accepted(module, [declared])
    else:
        return *find_input_size(module), None
    return size, classes, Preprocess(size[1], size[1]) if size[1] == size[2] else None


def _declared_size(module: nn.Module) -> Size | None:
    size = getattr(module, "input_size", None)
    if size is None:
        return None
    if not isinstance(size, tuple | list) or len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise InputError(f"the model's input_size is {size!r}; it must be (channels, height, width)")
    return size[0], size[1], size[2]


def _class_names(module: nn.Module, classes: int) -> tuple[str, ...] | None:
    names = getattr(module, "class_names", None)
    if names is None:
        return None
    if not isinstance(names, tuple | list) or len(names) != classes or not all(isinstance(n, str) for n in names):
        raise InputError(f"the model's class_names must be a list of {classes} strings, in label order")
    return tuple(names)
