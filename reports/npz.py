"""adversarials.npz: the verified successes as arrays, if the run saved them."""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from robust.errors import InputError
from robust.files import replacing
from robust.store import Store


def write_npz(store: Store, folder: Path) -> None:
    """x and x_adv (N, C, H, W) float32 in [0, 1], labels (N,) int64, ids and attacks (N,) text, eps (N,) float64, the
    smallest of the run's at which the image broke.

    Images go from the store to the file one at a time. Where the run was to save them and there are none, N is 0.
    InputError where they are not of one size.
    """
    labels, ids, attacks, smallest, shapes = [], [], [], [], set()
    for clean, attack, eps, x, _ in store.adversarials():
        labels.append(clean.label)
        ids.append(clean.sample_id)
        attacks.append(attack)
        smallest.append(eps)
        shapes.add(x.shape)
    if len(shapes) > 1:
        raise InputError("adversarials.npz needs images of one size; run without --save-adversarials")
    if not shapes and not store.identity["options"].get("save_adversarials"):
        return
    shape = (len(ids), *(shapes.pop() if shapes else store.identity["model"]["input_size"]))
    with replacing(folder / "adversarials.npz") as stream, zipfile.ZipFile(stream, "w") as archive:
        _add(archive, "x", shape, np.float32, (x for *_, x, _ in store.adversarials()))
        _add(archive, "x_adv", shape, np.float32, (x_adv for *_, x_adv in store.adversarials()))
        for name, column in (
            ("labels", np.array(labels, np.int64)),
            ("ids", np.array(ids, np.str_)),
            ("attacks", np.array(attacks, np.str_)),
            ("eps", np.array(smallest, np.float64)),
        ):
            _add(archive, name, column.shape, column.dtype, [column])


def _add(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: type | np.dtype, parts: Iterable[np.ndarray]
) -> None:
    """Append an array to the archive, part by part."""
    # A ZipInfo of its own has a fixed date, so that the same run makes the same bytes.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(cast(BinaryIO, member), header)
        for part in parts:
            member.write(part.tobytes())
