"""Where labelled images come from: one file a source.

    samples              the images that foolbox ships, those of the model's classes; samples:mnist names others
    cifar10, mnist, ...  torchvision's data sets, under --data-root (a folder of that name is ./cifar10)
    DIR, FILE.zip        class folders of images
    FILE.npz             arrays x and y
    panda.jpg            one image, with --label

Images stream: a data set holds ids, labels and where its images lie, and reads them one at a time. From Python,
any iterable of (x, y) is data too: batches.py.
"""

import os
from collections.abc import Callable
from pathlib import Path

from robust.data import folder, image, npz, samples, torchvision
from robust.data.names import errors_on_one_line, one_line
from robust.data.sample import Dataset, Sample
from robust.data.source import Request, Selection, Source, balanced, printable, require_labels
from robust.errors import InputError, unknown
from robust.models.model import Model

__all__ = ["SOURCES", "Dataset", "Sample", "load_data"]

# kind: (does the spec name one, load it); the first that accepts a spec takes it
SOURCES: dict[str, tuple[Callable[[str], bool], Callable[[Request], Source]]] = {
    "samples": (samples.accepts, samples.load),
    "torchvision": (torchvision.accepts, torchvision.load),
    "folder": (folder.is_directory, folder.load_directory),
    "zip": (folder.is_zip, folder.load_zip),
    "npz": (npz.accepts, npz.load),
    "image": (image.accepts, image.load),
}


@errors_on_one_line()
def load_data(
    spec: str,
    model: Model,
    *,
    limit: int | None = None,
    seed: int = 0,
    label: str | None = None,
    data_root: Path | None = None,
    skip_bad_images: bool = False,
) -> Dataset:
    """The data that a spec names, as pixels for `model`; the forms of a spec are this module's docstring.

    `limit` takes a class-balanced subset drawn from `seed` (see `balanced`), `label` is the class of a single
    image, `data_root` the folder of torchvision's data sets. With `skip_bad_images`, files that are no image or
    cannot be used are left out and named in `skipped`; without, they raise InputError, as do an unknown spec,
    labels outside the model's classes and anything ambiguous.
    """
    spec = os.path.expanduser(spec)
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    kind = next((kind for kind, (accepts, _) in SOURCES.items() if accepts(spec)), None)
    if kind is None:
        raise _unknown(spec)
    if label is not None and kind != "image":
        raise InputError(f"--label is for a single image, and {spec} holds its own labels: leave it out")
    if data_root is not None and kind != "torchvision":
        raise InputError(f"--data-root is for torchvision's data sets, and {spec} is none: leave it out")
    _, load = SOURCES[kind]
    source = printable(load(Request(spec, model, label, data_root, skip_bad_images)))
    if not source.ids:
        raise InputError(f"{spec} holds no images")
    require_labels(source.labels, source.ids, model.num_classes)
    positions = balanced(source.ids, source.labels, limit or len(source.ids), seed)
    return Selection(one_line(spec), source, positions, skip_bad_images)


def _unknown(spec: str) -> InputError:
    path = Path(spec)
    if path.exists() or path.suffix or len(path.parts) > 1:  # no data set is called so
        fault = "is not data" if path.exists() else "is no file or folder"
        return InputError(f"{spec} {fault}: give an image folder, a .zip of one, an .npz or an image file")
    return unknown("data", spec, ["samples", *torchvision.SETS], "(and there is no such file or folder)")
