"""What every data source yields."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One labelled image as the model sees it."""

    id: str  # stable, unique in its data set and one line of text, such as "n02510455/n02510455_giant_panda.jpg"
    x: Tensor  # (C, H, W) float32 in [0, 1], at the model's input size
    y: int  # ground truth, an index into the model's classes
    sha256: str  # of the source's bytes: the file, or the array's row, before any resizing

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        channels, height, width = self.x.shape
        return channels, height, width


@runtime_checkable
class Dataset(Protocol):
    """Samples in a fixed order, read one at a time; iterating again reads the same ones again.

    `class_names` are those that the data itself knows, in label order, else None.
    `size` is how many samples there are at most (images may be skipped); None for a stream of unknown length.
    `skipped` names the images left out by --skip-bad-images in the last iteration.
    """

    name: str
    class_names: tuple[str, ...] | None
    size: int | None
    skipped: list[str]

    def __iter__(self) -> Iterator[Sample]: ...
