"""An .npz with images `x` and labels `y`, its rows read from the file as they are needed.

x is uint8 (N, H, W) or (N, H, W, C), or float (N, C, H, W) in [0, 1]; y is integers (N,). Arrays are taken as
they are: nothing is resized or clipped, and gray stays one channel.
"""

import hashlib
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
from torch import Tensor

from robust.data.source import Request, Source, float32, require_pixels, row_ids
from robust.data.zips import open_zip
from robust.errors import InputError
from robust.models.model import Model
from robust.units import format_size


def accepts(spec: str) -> bool:
    return spec.lower().endswith(".npz") and Path(spec).is_file()


def load(request: Request) -> Source:
    path = Path(request.spec)
    with _errors_named(path):
        archive = open_zip(path)
        held = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        if missing := [name for name in ("x", "y") if name not in held]:
            raise InputError(
                f"{path} has no array {' and no '.join(missing)} (it holds {', '.join(held) or 'none'}): "
                "save it as numpy.savez(path, x=images, y=labels)"
            )
        x, y = _Array(archive, "x", path), _Array(archive, "y", path)
        _check(x, y, path, request.model)
        labels = [int(y.row(row)) for row in range(len(y))]

    def read(row: int) -> tuple[Tensor, str]:
        with _errors_named(path):
            values = x.row(row)
        return _pixels(values), hashlib.sha256(values.tobytes()).hexdigest()

    if x.dtype.kind == "f":
        # A wrong range is found now, and not in the middle of a long run.
        for row in range(len(x)):
            require_pixels(read(row)[0], f"x[{row}] of {path}")
    return Source(row_ids(len(x)), labels, read)


class _Array:
    """One array of an .npz. Rows read in rising order cost one pass over the file."""

    def __init__(self, archive: ZipFile, name: str, path: Path):
        self._stream = archive.open(f"{name}.npy")
        version = np.lib.format.read_magic(self._stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, fortran, self.dtype = header(self._stream)
        self._start = self._stream.tell()
        if fortran:
            raise InputError(f"{name} of {path} is in Fortran order: save numpy.ascontiguousarray({name})")

    def __len__(self) -> int:
        return self.shape[0]

    def row(self, row: int) -> np.ndarray:
        shape = self.shape[1:]
        size = math.prod(shape) * self.dtype.itemsize
        self._stream.seek(self._start + row * size)
        raw = self._stream.read(size)
        if len(raw) < size:
            raise EOFError("it ends early")
        return np.frombuffer(raw, self.dtype).reshape(shape)


def _check(x: _Array, y: _Array, path: Path, model: Model) -> None:
    found = f"x of {path} is {x.dtype} {x.shape}"
    is_image = x.dtype == np.uint8 and len(x.shape) in (3, 4)
    if not is_image and not (x.dtype.kind == "f" and len(x.shape) == 4):
        raise InputError(f"{found}: give uint8 (N, H, W) or (N, H, W, C), or float in [0, 1] (N, C, H, W)")
    if y.dtype.kind not in "iu" or len(y.shape) != 1:
        raise InputError(f"y of {path} is {y.dtype} {y.shape}: give integers (N,)")
    if len(x) != len(y):
        raise InputError(f"x of {path} has {len(x)} rows and y has {len(y)}: give one label for each image")
    if math.prod(x.shape) == 0:
        raise InputError(f"{found}, which holds no image")
    layout = "uint8 is (N, H, W) or (N, H, W, C)" if is_image else "float is (N, C, H, W)"
    shape = tuple(_pixels(x.row(0)).shape)
    if model.input_size is None and shape[0] not in (1, 3):
        raise InputError(f"{found}, so it has {shape[0]} channels: {layout}; or name the size with --input-size")
    if model.input_size not in (None, shape):
        raise InputError(
            f"{found}, so its images are {format_size(shape)}, and {model.name} takes "
            f"{format_size(model.input_size)}: {layout}, at the model's size; or name that with --input-size"
        )


def _pixels(row: np.ndarray) -> Tensor:
    """(H, W) or (H, W, C) uint8, or (C, H, W) float, as (C, H, W) float32 in [0, 1]."""
    if row.dtype == np.uint8:
        return float32(np.atleast_3d(row).transpose(2, 0, 1)).div(255)
    return float32(row)


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, ValueError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read as an .npz ({reason})") from None
