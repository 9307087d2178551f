"""Robust accuracy against eps, as SVG: one for papers, and two for the HTML (wide and narrow screens)."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from reports.answer import attack_label
from robust.files import write_text
from robust.statistics import CERTIFIED, CONTROL, WORST_CASE, wilson
from robust.store import Store
from robust.units import format_eps, format_percent

# Okabe and Ito's colours, told apart by colour-blind readers too; black and orange are the worst case's and
# the control's. Markers and dashes say the same again.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_CONTROL_COLOUR = "#E69F00"
_MARKERS = "osD^vPX"
_DASHES = ("-", "-.", ":")
# Stands for the colour of text; inside the HTML it becomes that of the page, light or dark.
_INK = "#010203"

_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


Nearest = Mapping[str, np.ndarray]  # attack -> distances, rising


@dataclass(frozen=True)
class Layout:
    """Sizes in points, which are the SVG's units."""

    width: float
    height: float
    font: float
    ticks: int  # at most so many labelled eps


WIDE = Layout(width=720, height=400, font=13, ticks=11)
NARROW = Layout(width=340, height=320, font=12, ticks=6)
PAPER = Layout(width=460, height=300, font=10, ticks=9)


def write_curve(store: Store, folder: Path) -> None:
    """figures/curve.svg, a file that stands alone: black on nothing, its letters as outlines."""
    svg = _svg(with_certified(store.summary(), store), nearest(store), PAPER, fonttype="path", salt="paper")
    write_text(folder / "figures" / "curve.svg", svg.replace(_INK, "#000000"))


def with_certified(summary: pd.DataFrame, store: Store) -> pd.DataFrame:
    """The summary, and below it a row an eps of what is certified, where anything is."""
    counts = store.certified()
    if not any(counts):
        return summary
    rows = summary[summary.attack == WORST_CASE].sort_values("eps")
    shares = [count / int(rows.n.iloc[0]) for count in counts]
    low, high = zip(*(wilson(count, int(rows.n.iloc[0])) for count in counts), strict=True)
    return pd.concat([summary, rows.assign(attack=CERTIFIED, robust_accuracy=shares, ci_low=low, ci_high=high)])


def nearest(store: Store) -> Nearest:
    """Of each attack on the least distance, the distances at which it broke images, rising.

    Where several such attacks ran and no other, those of the worst case too: image by image, the least of all.
    """
    found = {attack: store.nearest(attack) for attack in store.identity["options"]["attacks"]}
    if len(found) > 1 and all(found.values()):
        broken = set().union(*found.values())
        worst = {k: min(at[k] for at in found.values() if k in at) for k in broken}
        found = {WORST_CASE: worst, **found}
    return {attack: np.sort(list(distances.values())) for attack, distances in found.items() if distances}


def inline_svg(summary: pd.DataFrame, distances: Nearest, layout: Layout, css_class: str) -> str:
    """An <svg> for HTML, in the page's font and colour of text, naming nothing outside the page."""
    # The salt keeps the ids of two of them on one page apart.
    svg = _svg(summary, distances, layout, fonttype="none", salt=css_class)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = body.replace("xlink:href", "href").replace(_INK, "currentColor")
    height = _height(summary, layout)
    return (
        f'<svg class="{css_class}" viewBox="0 0 {layout.width:g} {height:g}" role="img" '
        f'aria-label="{escape(describe(summary))}">{body}'
    )


def describe(summary: pd.DataFrame) -> str:
    """The curve in words, for those who do not see it."""
    worst = summary[summary.attack == WORST_CASE]
    points = ", ".join(
        f"{format_percent(row.robust_accuracy)} at {format_eps(row.eps, row.norm)}" for row in worst.itertuples()
    )
    clean = format_percent(float(worst.clean_accuracy.iloc[0]))
    return f"Robust accuracy against eps: {clean} without an attack; in the worst case {points}."


def _svg(summary: pd.DataFrame, distances: Nearest, layout: Layout, fonttype: str, salt: str) -> str:
    with matplotlib.rc_context({"svg.fonttype": fonttype, "svg.hashsalt": salt, "font.size": layout.font}):
        stream = io.StringIO()
        _draw(summary, distances, layout).savefig(stream, format="svg", transparent=True, metadata=_NO_METADATA)
    return stream.getvalue()


def _draw(summary: pd.DataFrame, distances: Nearest, layout: Layout) -> Figure:
    figure = Figure(figsize=(layout.width / 72, _height(summary, layout) / 72), layout="constrained")
    axes = figure.subplots()
    exact = {attack: _steps(summary[summary.attack == attack], found) for attack, found in distances.items()}
    for attack, style in _styles(summary):
        eps, accuracy, low, high = _points(summary[summary.attack == attack])
        # Nothing is clipped: a marker at 0 % or 100 % is drawn whole, and no clip path needs a url().
        if attack != CERTIFIED:
            axes.fill_between(eps, low, high, color=style["color"], alpha=0.08, linewidth=0, clip_on=False)
        if attack == WORST_CASE:
            if attack in exact:
                (eps, accuracy), style = exact[attack], style | {"drawstyle": "steps-post"}
            else:
                eps, accuracy = _beneath(eps, accuracy, list(exact.values()))
        elif attack in exact:
            axes.step(*exact[attack], where="post", color=style["color"], linewidth=style["linewidth"])
            style |= {"linestyle": "none"}
        axes.plot(eps, accuracy, label=attack_label(attack), clip_on=False, **style)
    ticks = _ticks(sorted(summary.eps.unique()), layout.ticks)
    norm = str(summary.norm.iloc[0])
    axes.set(
        xlim=(0, summary.eps.max()),
        ylim=(0, 100),
        xticks=ticks,
        xticklabels=["0", *(format_eps(eps, norm) for eps in ticks[1:])],
        yticks=range(0, 101, 20),
        yticklabels=[f"{percent} %" for percent in range(0, 101, 20)],
        xlabel="eps, the largest change of any pixel" if norm == "linf" else f"eps, the {norm} size of the change",
        ylabel="robust accuracy",
    )
    axes.grid(color=_INK, alpha=0.13, linewidth=0.8, clip_on=False)
    axes.tick_params(length=0, pad=7, labelcolor=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=_INK, alpha=0.5)
    legend = figure.legend(
        loc="outside upper left",
        ncols=_legend_columns(summary, layout),
        frameon=False,
        labelcolor=_INK,
        handlelength=2.6,
        columnspacing=1.6,
        borderaxespad=0.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _styles(summary: pd.DataFrame) -> Iterator[tuple[str, dict]]:
    """Each attack with how its line is drawn: the worst case first, thick and beneath, so that none hides it."""
    yield WORST_CASE, {"color": _INK, "linewidth": 6, "alpha": 0.35, "solid_capstyle": "round"}
    attacks = [str(attack) for attack in summary.attack.unique() if attack not in (WORST_CASE, CONTROL, CERTIFIED)]
    for k, attack in enumerate(attacks):
        yield (
            attack,
            {
                "color": _COLOURS[k % len(_COLOURS)],
                "marker": _MARKERS[k % len(_MARKERS)],
                "linestyle": _DASHES[k // len(_COLOURS) % len(_DASHES)],
                "linewidth": 2,
                "markersize": 6,
            },
        )
    if CONTROL in set(summary.attack):
        yield CONTROL, {
            "color": _CONTROL_COLOUR, "marker": "X", "linestyle": "--", "linewidth": 2, "markersize": 7,
        }  # fmt: skip
    if CERTIFIED in set(summary.attack):  # what is proved at one eps holds at all smaller ones
        yield CERTIFIED, {"color": _INK, "linestyle": ":", "linewidth": 2, "drawstyle": "steps-pre"}


def _points(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(eps, accuracy, low, high) of one attack in percent, beginning at eps 0 with the clean accuracy."""
    clean, n = float(rows.clean_accuracy.iloc[0]), int(rows.n.iloc[0])
    start = np.array([[0.0, clean, *wilson(round(clean * n), n)]])
    rows = rows.sort_values("eps")
    table = np.concatenate([start, rows[["eps", "robust_accuracy", "ci_low", "ci_high"]].to_numpy(float)])
    return table[:, 0], 100 * table[:, 1], 100 * table[:, 2], 100 * table[:, 3]


def _steps(rows: pd.DataFrame, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(eps, accuracy) of the exact curve in percent, falling by one image at each distance up to the largest eps."""
    clean, n, largest = float(rows.clean_accuracy.iloc[0]), int(rows.n.iloc[0]), float(rows.eps.max())
    reached = distances[distances <= largest]
    left = clean - np.arange(len(reached) + 1) / n
    return np.concatenate([[0.0], reached, [largest]]), 100 * np.append(left, left[-1])


def _beneath(eps: np.ndarray, accuracy: np.ndarray, steps: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Any, Any]:
    """The line through (eps, accuracy), lowered where it runs above a curve that is known between these eps too."""
    at = np.unique(np.concatenate([eps, *(radii for radii, _ in steps)]))
    at = np.repeat(at, 2)  # just before each step, and after it
    line = np.interp(at, eps, accuracy)
    for radii, left in steps:
        before = left[np.maximum(np.searchsorted(radii, at[::2], "left") - 1, 0)]
        after = left[np.searchsorted(radii, at[1::2], "right") - 1]
        line = np.minimum(line, np.stack([before, after], axis=1).ravel())
    return at, line


def _ticks(eps: list[float], most: int) -> list[float]:
    """0 and those of the measured eps, from the largest down, whose labels have room."""
    room = eps[-1] / most
    ticks: list[float] = []
    for value in reversed(eps):
        if value >= room and (not ticks or ticks[-1] - value >= room):
            ticks.append(value)
    return [0.0, *reversed(ticks)]


def _legend_columns(summary: pd.DataFrame, layout: Layout) -> int:
    """As many as fit. A column, filled from the top, is as wide as its longest label and the line before it."""
    widths = [(0.6 * len(attack_label(attack)) + 5) * layout.font for attack, _ in _styles(summary)]
    for columns in range(len(widths), 1, -1):
        if sum(part.max() for part in np.array_split(widths, columns)) <= layout.width:
            return columns
    return 1


def _height(summary: pd.DataFrame, layout: Layout) -> float:
    """Every line of the legend beyond the first makes the figure taller, not the curve smaller."""
    lines = -(-summary.attack.nunique() // _legend_columns(summary, layout))
    return layout.height + (lines - 1) * 1.6 * layout.font
