"""Any Python iterable of (x, y) as a data set: what `robust.run(model, data)` is given."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from robust.data.sample import Dataset, Sample
from robust.data.source import float32, require_labels, require_pixels, require_same_size
from robust.errors import InputError

_ONCE = "is an iterator, which is read once: give a list or a DataLoader"


def from_batches(
    data: Iterable[Any],
    *,
    num_classes: int | None = None,
    name: str = "data",
    class_names: tuple[str, ...] | None = None,
) -> Dataset:
    """Samples from an iterable of batches (x, y), x (N, C, H, W) and y (N,); of single samples, x (C, H, W) and
    y an integer, as torchvision's data sets are; or from one pair (x, y) of whole arrays.

    x is float in [0, 1], y integers below `num_classes` (where that is known); both tensors or arrays. Items are
    read as they are asked for, and an iterator only once: InputError on a second pass, and wherever an item is
    not as said here.
    """
    return _Batches(data, num_classes, name, class_names)


class _Batches:
    def __init__(self, data: Iterable[Any], num_classes: int | None, name: str, class_names: tuple[str, ...] | None):
        if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
            way = ": give a folder or file by its name, str(path)" if isinstance(data, os.PathLike) else ""
            raise InputError(f"data must be an iterable of (x, y), not {type(data).__name__}{way}")
        self.name = name
        self.class_names = class_names
        self.skipped: list[str] = []
        self._num_classes = num_classes
        self._items: Any = [data] if _is_pair_of_arrays(data) else data
        self._spent = False
        self.size = _size(self._items)

    def __iter__(self) -> Iterator[Sample]:
        if self._spent:
            raise InputError(f"{self.name} {_ONCE}")
        self._spent = isinstance(self._items, Iterator)
        first: Sample | None = None
        for position, (x, y) in enumerate(_pairs(self._items, self.name)):
            sample = Sample(f"{position:05d}", x, y, hashlib.sha256(x.numpy().tobytes()).hexdigest())
            first = first or sample
            require_pixels(x, f"sample {sample.id} of {self.name}")
            require_same_size(sample, first)
            if self._num_classes is not None:
                require_labels([y], [sample.id], self._num_classes)
            yield sample
        if first is None and self._spent:
            raise InputError(f"no image left: {self.name} {_ONCE}")


def _pairs(items: Any, name: str) -> Iterator[tuple[Tensor, int]]:
    # A map-style torch data set need not say how to iterate over it, nor raise IndexError at its end.
    indexed = not hasattr(items, "__iter__") and hasattr(items, "__len__")
    each = (items[i] for i in range(len(items))) if indexed else items
    for number, item in enumerate(each):
        where = f"item {number} of {name}"
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise InputError(f"{where} is {_no_pair(item)}")
        x, y = item
        if not _is_array(x):
            raise InputError(
                f"x of {where} is a {type(x).__name__}: give a tensor or an array, for images with the "
                "transform torchvision.transforms.ToTensor()"
            )
        labels = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
        _check_item(x, labels, where)
        if x.ndim == 3:
            x, labels = x[None], labels[None]
        for row, label in enumerate(labels):
            yield _pixels(x[row]), int(label)


def _no_pair(item: Any) -> str:
    """What an item is instead of a pair, and what to do about it."""
    kind = type(item).__name__
    if not isinstance(item, tuple | list | Mapping):
        return f"a {kind}, not a pair (x, y): give images with their labels"
    parts = ", ".join(map(str, item)) if isinstance(item, Mapping) else f"{len(item)} parts"
    return f"a {kind} of {parts}, not a pair (x, y): pick these, ((item[...], item[...]) for item in data)"


def _check_item(x: Tensor | np.ndarray, y: np.ndarray, where: str) -> None:
    shape = tuple(x.shape)
    if isinstance(x, Tensor) and (x.layout != torch.strided or x.is_meta):
        raise InputError(f"x of {where} is no dense tensor with values: give one, such as x.to_dense()")
    if x.ndim not in (3, 4) or 0 in shape[-3:]:
        raise InputError(f"x of {where} has shape {shape}: give batches (N, C, H, W) or images (C, H, W)")
    if not (x.is_floating_point() if isinstance(x, Tensor) else x.dtype.kind == "f"):
        raise InputError(f"x of {where} is {x.dtype}: give floats in [0, 1], such as 8-bit values divided by 255")
    if y.dtype.kind not in "iu" or y.shape != shape[:-3]:
        wanted = f"integers ({shape[0]},)" if x.ndim == 4 else "one integer"
        if x.ndim == 3 and y.shape == shape[:1]:
            wanted += "; or is x a batch? It needs a channel axis, (N, C, H, W): x.unsqueeze(1), or x[:, None]"
        if y.ndim == 2 and x.ndim == 4:
            wanted += ", such as y.argmax(1) of one-hot rows"
        raise InputError(f"y of {where} is {y.dtype} {y.shape} and x is {shape}: y must be {wanted}")


def _pixels(row: Tensor | np.ndarray) -> Tensor:
    # Copied: a loader may use the memory of one batch again for the next.
    if isinstance(row, Tensor):
        return row.detach().to("cpu", torch.float32, copy=True).contiguous()
    return float32(row)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_pair_of_arrays(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and _is_array(data[0]) and _is_labels(data[1])


def _is_labels(value: Any) -> bool:
    listed = isinstance(value, tuple | list) and len(value) > 0 and all(isinstance(label, Integral) for label in value)
    return listed or hasattr(value, "__array__")  # as those of pandas have, too


def _size(items: Any) -> int | None:
    """How many samples there are at most, where that is known without reading them."""
    if isinstance(items, DataLoader):
        items = items.dataset
    if isinstance(items, TorchDataset):
        return len(items) if hasattr(items, "__len__") else None
    if isinstance(items, list | tuple):
        return sum(map(_rows, items))
    return None


def _rows(item: Any) -> int:
    x: Any = item[0] if isinstance(item, tuple | list) and item else None
    return len(x) if _is_array(x) and x.ndim == 4 else 1
