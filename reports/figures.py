"""figures/panda_*.png: image + eps × perturbation = adversarial, for papers and slides.

After figure 1 of Goodfellow et al. 2015 (arXiv 1412.6572).
"""

import re
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from matplotlib.figure import Figure

from reports.gallery import Example, choose
from robust.files import replacing
from robust.store import Store
from robust.units import format_class, format_percent

# 300 dpi and letters twice as large as in print: at half the width of a page they are still legible.
_DPI = 300
_SIDE, _EQUALS = 1.75, 0.4  # inches: a picture's width, and the room for the sign between two
_LINE, _MARGIN = 0.26, 0.08  # inches: a line of text, and the room around it
_LARGE, _SMALL = 15, 12  # points
_LETTERS = 16  # of _LARGE that fit under a picture


def write_figures(store: Store, folder: Path) -> None:
    """One figure an example; those of an earlier report on the same run go, and what one that was killed left."""
    class_names = store.details.get("class_names")
    written = set()
    for k, example in enumerate(choose(store, store.summary()), start=1):
        path = folder / "figures" / f"panda_{k}_{_safe(example.clean.sample_id)}.png"
        with replacing(path) as stream, warnings.catch_warnings():
            # A class name may need a letter that the font lacks; a box in its place is answer enough.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            # Packed twice as fast as by default; photographs take a tenth more.
            panda(example, class_names).savefig(stream, format="png", dpi=_DPI, pil_kwargs={"compress_level": 3})
        written.add(path)
    for path in set((folder / "figures").glob("*panda_*.png*")) - written:
        path.unlink()


def panda(example: Example, class_names: Sequence[str] | None) -> Figure:
    """Three pictures in a row, the name and the confidence beneath each."""
    picture, clean = example.picture, example.clean
    limit = ", not in 8 bits" if example.drawn_alike else " confidence"
    before = _lines(format_class(clean.clean_pred, class_names))
    after = _lines(format_class(picture.adv_pred, class_names))
    panels = (
        (picture.x, before, f"{format_percent(clean.clean_confidence)} confidence"),
        (example.perturbation, ["perturbation"], example.factor),
        (picture.x_adv, after, f"{format_percent(picture.adv_confidence)}{limit}"),
    )
    plus = f"+ {example.scale_label} ×"
    room_for_plus = 0.2 + 0.6 * len(plus) * _LARGE / 72
    text = _LINE * (max(len(before), len(after)) + 1) + 2 * _MARGIN
    tall = _SIDE * picture.x.shape[1] / picture.x.shape[2]
    width, height = 3 * _SIDE + room_for_plus + _EQUALS + 2 * _MARGIN, _MARGIN + tall + text
    figure = Figure(figsize=(width, height), facecolor="white")

    def write(x: float, y: float, words: str, size: float, va: str) -> None:
        # Not as mathematics: a class name may hold a dollar sign.
        figure.text(x / width, y / height, words, fontsize=size, ha="center", va=va, parse_math=False)

    left = _MARGIN
    signs = ((plus, room_for_plus), ("=", _EQUALS), ("", 0))
    for (image, label, note), (sign, room) in zip(panels, signs, strict=True):
        axes = figure.add_axes((left / width, text / height, _SIDE / width, tall / height))
        axes.imshow(_pixels(image), interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        for row, (words, size) in enumerate([*((words, _LARGE) for words in label), (note, _SMALL)]):
            write(left + _SIDE / 2, text - _MARGIN - row * _LINE, words, size, "top")
        left += _SIDE + room
        write(left - room / 2, text + tall / 2, sign, _LARGE, "center")
    return figure


def _pixels(image: np.ndarray) -> np.ndarray:
    """(C, H, W), C 1 or 3, as (H, W, 3)."""
    return np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)


def _lines(name: str) -> list[str]:
    return textwrap.wrap(name, _LETTERS, max_lines=2, placeholder=" …") or [name]


def _safe(sample_id: str) -> str:
    """The last part of a sample's id, as part of a file name on any system."""
    stem = PurePosixPath(sample_id.replace("\\", "/")).stem
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:60].strip("_") or "image"
