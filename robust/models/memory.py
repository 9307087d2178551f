"""A user's module in memory, from a script or a notebook."""

from collections.abc import Iterable, Sequence

from torch import nn

from robust.errors import InputError
from robust.models import imagenet
from robust.models.model import Model, fingerprint
from robust.models.prepare import frozen, in_training
from robust.models.probe import Size, check_parameters, count_classes


def wrap(module: nn.Module, size: Size, class_names: Sequence[str] | None = None) -> Model:
    """The module as a Model; its output for images of this size says how many classes it has.

    InputError where that is no classifier's, or there are other class names.
    """
    check_parameters(module)
    with frozen(module):
        num_classes = count_classes(module, size)
    names = None if class_names is None else tuple(class_names) if isinstance(class_names, Iterable) else (class_names,)
    if names and not all(isinstance(name, str) for name in names):
        raise InputError(f"class_names must be {num_classes} strings, in label order")
    if names is not None and len(names) != num_classes:
        raise InputError(f"class_names has {len(names)} names and the model {num_classes} classes")
    return Model(
        name=type(module).__name__,
        source="a module in memory",
        module=module,
        num_classes=num_classes,
        class_names=None if names is None else tuple(map(str, names)),  # numpy's strings are no JSON
        wnids=imagenet.wnids_of(num_classes, names),
        fingerprint=fingerprint(module),
        was_training=in_training(module),
    )
