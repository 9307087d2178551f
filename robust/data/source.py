"""What a data source knows before any image is read, and the data set that is drawn from it."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robust.data.images import BadImage
from robust.data.names import errors_on_one_line, one_line, sample_id
from robust.data.sample import Sample
from robust.errors import InputError
from robust.models.model import Model
from robust.units import format_size


@dataclass(frozen=True)
class Request:
    """What `load_data` was asked for."""

    spec: str
    model: Model
    label: str | None = None
    data_root: Path | None = None
    skip_bad_images: bool = False


@dataclass(frozen=True)
class Source:
    """Ids and labels of every sample, in data order; the images themselves stay where they are.

    `read(i)` gives the i-th sample's x, (C, H, W) float32 in [0, 1], and the SHA-256 of its bytes. It raises
    BadImage where this one image cannot be used. `skipped` names files that are left out from the start.
    """

    ids: Sequence[str]
    labels: Sequence[int]
    read: Callable[[int], tuple[Tensor, str]]
    class_names: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()


class Selection:
    """The Dataset of some positions of a source, read one at a time."""

    def __init__(self, name: str, source: Source, positions: Sequence[int], skip_bad_images: bool):
        self.name = name
        self.class_names = source.class_names
        self.size: int | None = len(positions)
        self.skipped = list(source.skipped)
        self._source = source
        self._positions = positions
        self._skip_bad_images = skip_bad_images

    def __iter__(self) -> Iterator[Sample]:
        self.skipped = list(self._source.skipped)
        first: Sample | None = None
        for position in self._positions:
            id = self._source.ids[position]
            try:
                with errors_on_one_line():
                    x, sha256 = self._source.read(position)
            except BadImage:
                if not self._skip_bad_images:
                    raise
                self.skipped.append(id)
                continue
            sample = Sample(id, x, self._source.labels[position], sha256)
            first = first or sample
            require_same_size(sample, first)
            yield sample
        if first is None:
            raise InputError(f"no image of {self.name} can be used: all of them were skipped")


def printable(source: Source) -> Source:
    """The source with ids and class names that are valid text on one line, whatever its files are called."""
    return replace(
        source,
        ids=list(map(sample_id, source.ids)),
        class_names=source.class_names and tuple(map(one_line, source.class_names)),
        skipped=tuple(map(sample_id, source.skipped)),
    )


def float32(values: np.ndarray) -> Tensor:
    """A float array of any precision and memory layout as a contiguous float32 tensor of its own."""
    with np.errstate(over="ignore"):  # becomes infinity, which `require_pixels` refuses
        return torch.from_numpy(np.array(values, np.float32, order="C"))


def require_pixels(x: Tensor, name: str) -> None:
    """InputError unless every value of x, float32, lies in [0, 1].

    Rounding is no excuse: what is evaluated is what was given. Values out by 1e-6 at most are refused too, and the
    message says to clip them.
    """
    low, high = (bound.item() for bound in x.aminmax())
    if not math.isfinite(high - low):
        raise InputError(f"{name} holds NaN or infinity: pixels must be in [0, 1]")
    if low < 0 or high > 1:
        if low >= -1e-6 and high <= 1 + 1e-6:
            way = "clip what rounding has added, as x.clip(0, 1) does"
        else:
            way = "divide by 255" if low >= 0 and high > 16 else "put the normalisation inside the model"
        # Nine digits tell any two floats apart.
        raise InputError(f"pixels must be in [0, 1]; found {low:.9g} .. {high:.9g} in {name}: {way}")


def require_same_size(sample: Sample, first: Sample) -> None:
    if sample.shape != first.shape:
        raise InputError(
            f"{sample.id} is {format_size(sample.shape)} and {first.id} is {format_size(first.shape)}: "
            "give images of one size, or name the model's with --input-size"
        )


def require_labels(labels: Sequence[int], ids: Sequence[str], num_classes: int) -> None:
    for id, label in zip(ids, labels, strict=True):
        if not 0 <= label < num_classes:
            raise InputError(
                f"label {label} of {id} is outside the model's {num_classes} classes, 0 .. {num_classes - 1}: "
                "give data and a model of the same classes"
            )


def balanced(ids: Sequence[str], labels: Sequence[int], limit: int, seed: int) -> list[int]:
    """Positions of a class-balanced subset of `limit` samples, in data order; all of them where there are fewer.

    Within each class the samples are ranked by SHA-256 of "seed/id". The subset is made of every class's
    first, then every class's second and so on; the hash decides too which classes have one more at the end.
    So it depends on the seed and the ids alone, and a larger limit only adds to it.
    """
    if limit >= len(ids):
        return list(range(len(ids)))
    by_hash = sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed}/{ids[i]}".encode()).digest())
    seen: defaultdict[int, int] = defaultdict(int)
    rank = {}
    for position in by_hash:
        rank[position] = seen[labels[position]]
        seen[labels[position]] += 1
    return sorted(sorted(by_hash, key=rank.__getitem__)[:limit])


def row_ids(count: int) -> list[str]:
    """Zero-padded, so that ids sort as the rows do: '00000', '00001' ..."""
    width = max(5, len(str(count - 1)))
    return [f"{row:0{width}d}" for row in range(count)]
