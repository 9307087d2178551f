"""Which attacked images the report shows, and how their perturbations are drawn."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from reports.answer import headline, strongest
from robust.statistics import CONTROL, WORST_CASE
from robust.store import Clean, Picture, Store
from robust.units import format_distance, format_eps

MOST = 12
TYPICAL = 4  # of those drawn at random: farther ones are not near the median

_LEVEL = 1 / 255  # of an 8-bit channel: the unit of a change where eps is none

# In the order in which they are shown.
ROLES = {
    "smallest": "Smallest change",
    "typical": "Median change",
    "confident": "Most confident error",
    "withstood": "Withstood",
}


@dataclass(frozen=True)
class Example:
    """One picture of the report: what it is, and what its attack made of it."""

    picture: Picture
    clean: Clean
    norm: str

    @property
    def scale(self) -> float:
        """What the drawn perturbation, in [-1, 1], is multiplied by to give the true one."""
        return self.picture.eps if self.norm == "linf" else self.picture.distance_linf

    @property
    def scale_label(self) -> str:
        """`scale` in words: '4/255'."""
        return format_eps(self.scale, "linf") if self.norm == "linf" else format_distance(self.scale, "linf", _LEVEL)

    @property
    def factor(self) -> str:
        """How much stronger than it is the perturbation is drawn."""
        return f"× {1 / (2 * self.scale):.3g} for the eye" if self.scale else "no change"

    @property
    def size(self) -> str:
        """The true size of the perturbation, in words."""
        eps = self.picture.eps if self.norm == "linf" else _LEVEL
        largest = format_distance(self.picture.distance_linf, "linf", eps)
        own = f", {self.norm} {self.picture.distance:.3g}" if self.norm in ("l1", "l0") else ""
        gone = ", too small for 8 bits: both pictures are drawn alike" if self.drawn_alike else ""
        return f"at most {largest} a pixel (linf), l2 {self.picture.distance_l2:.3g}{own}{gone}"

    @property
    def drawn_alike(self) -> bool:
        """Whether rounding to 8 bits, as pictures are drawn, leaves nothing of a perturbation."""
        return bool(self.scale) and np.array_equal(_levels(self.picture.x), _levels(self.picture.x_adv))

    @property
    def perturbation(self) -> np.ndarray:
        """(C, H, W) in [0, 1]: 0.5 + δ / (2 eps); in l2, where eps bounds no pixel, the largest fills the range."""
        delta = self.picture.x_adv - self.picture.x
        return np.clip(0.5 + delta / (2 * self.scale or 1), 0, 1)


def choose(store: Store, summary: pd.DataFrame) -> list[Example]:
    """At most `MOST` examples by the rule of `rule`, no image twice: the best of each role, then the next, ..."""
    attack, norm = strongest(summary), str(headline(summary).norm)
    median = _median_l2(store, summary)
    pictures = [picture for picture in store.pictures() if picture.attack == attack and len(picture.x) in (1, 3)]
    by_role = {role: [picture for picture in pictures if picture.role == role] for role in ROLES}
    by_role["typical"].sort(key=lambda picture: abs(picture.distance_l2 - median))
    del by_role["typical"][TYPICAL:]
    queues = [iter(queue) for queue in by_role.values()]
    chosen: dict[int, Picture] = {}
    for queue in queues * MOST:
        picture = next((other for other in queue if other.position not in chosen), None)
        if picture is not None:
            chosen[picture.position] = picture
    return [Example(picture, store.clean(picture.position, 1)[0], norm) for picture in chosen.values()][:MOST]


def rule(store: Store, summary: pd.DataFrame, chosen: Sequence[Example]) -> str:
    """The rule by which `choose` has chosen these, as it is printed; or why there are none."""
    if not chosen:
        return _why_none(summary)
    attack, row = strongest(summary), headline(summary)
    median = _median_l2(store, summary)
    words = {
        "smallest": "those with the smallest change in l2",
        "typical": f"of some drawn at random, those nearest to the median change (l2 {median:.3g})",
        "confident": "those with the most confident wrong answer",
        "withstood": "some drawn at random that withstood it",
    }
    shown = {example.picture.role for example in chosen}
    *before, last = [said for role, said in words.items() if role in shown]
    return (
        f"Chosen by rule, not by beauty, from {attack}, {_fewest(summary, attack)} at "
        f"{format_eps(row.eps, row.norm)}: {''.join(f'{said}; ' for said in before)}{'and ' if before else ''}{last}. "
        "No image is shown twice."
    )


def _fewest(summary: pd.DataFrame, attack: str) -> str:
    """Whether the strongest attack is so at the largest eps already, where others may leave as few."""
    rows = summary[(summary.eps == summary.eps.max()) & ~summary.attack.isin([WORST_CASE, CONTROL])]
    least = rows.attack[rows.robust_accuracy == rows.robust_accuracy.min()]
    return "the attack that leaves the fewest images" if len(least) < 2 else "one of those that leave the fewest images"


def _why_none(summary: pd.DataFrame) -> str:
    attack = strongest(summary)
    if not summary.clean_accuracy.any():
        return "None: no image was classified correctly, and so none was attacked."
    if attack == CONTROL:
        return "None: of the noise control no picture is kept."
    if not summary.forwards[summary.attack == attack].any():
        return f"None: all images that are classified correctly are certified, and {attack} was spared them."
    return f"The run kept no picture of {attack} that can be shown here."


def _median_l2(store: Store, summary: pd.DataFrame) -> float:
    """The median l2 size of the strongest attack's successes, each image once; NaN where it has none."""
    found = store.distances(float(summary.eps.max()), "l2", strongest(summary))
    return float(np.median(found)) if len(found) else math.nan


def _levels(image: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    """(C, H, W) in [0, 1], C 1 or 3, as the bytes of an 8-bit PNG at native resolution."""
    levels = _levels(image)
    stream = io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def data_uri(image: np.ndarray) -> str:
    """The same as an address that needs no file, for HTML."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()
