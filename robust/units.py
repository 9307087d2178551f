"""How numbers are said to people, in the terminal and in the report alike."""

import math
from collections.abc import Sequence

LONGEST = 80  # characters of a class's name that are printed


def format_eps(eps: float, norm: str) -> str:
    """A perturbation size in the unit people think in: '4/255', '0.5/255', else '0.3'.

    Only linf sizes are fractions of 255, the levels of an 8-bit channel, and only those that are not round
    decimals: 0.3 stays 0.3 although it is also 76.5/255.
    """
    if norm == "linf" and abs(eps - round(eps, 4)) > 1e-6:
        levels = round(eps * 255, 2)
        if abs(eps - levels / 255) <= 1e-6:
            return f"{levels:g}/255"
    return f"{eps:.6g}"


def same_eps(a: float, b: float) -> bool:
    """Whether two people, or two files, mean the same eps: a spreadsheet keeps eight digits or so."""
    return math.isclose(a, b, rel_tol=1e-6)


def format_distance(distance: float, norm: str, eps: float) -> str:
    """A measured distance to three digits, in the unit that `eps` is written in; '–' for NaN."""
    if math.isnan(distance):
        return "–"
    if format_eps(eps, norm).endswith("/255"):
        return f"{distance * 255:.3g}/255"
    return f"{distance:.3g}"


def format_percent(part: float, whole: float = 1) -> str:
    """`part` of `whole` with one decimal; '0 %' and '100 %' only if it is exactly that; '–' for NaN."""
    return "–" if math.isnan(part) else f"{_percentage(part, whole)} %"


def format_interval(low: float, high: float) -> str:
    """An interval of proportions: '53.1–88.8 %'."""
    return f"{_percentage(low)}–{_percentage(high)} %"


def format_count(count: int) -> str:
    """An integer with its thousands separated: '1,234,567'."""
    return f"{count:,}"


def format_images(count: int) -> str:
    """'1 image', '1,234 images'."""
    return f"{count:,} {'image' if count == 1 else 'images'}"


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units: '0.42 s', '12.3 s', '2 min 5 s', '3 h 4 min', '2 d 5 h'."""
    if seconds < 0.995:
        return f"{seconds:.2g} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    if seconds < 24 * 3600 - 30:
        return "{} h {} min".format(*divmod(round(seconds / 60), 60))
    return "{} d {} h".format(*divmod(round(seconds / 3600), 24))


def format_class(label: int, class_names: Sequence[str] | None) -> str:
    """The class's name, the beginning of a long one, or its index where the names are not known."""
    name = class_names[label] if class_names else str(label)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def format_size(size: Sequence[int]) -> str:
    """That of an image, (C, H, W): '3 x 224 x 224 (channels, height, width)'."""
    return f"{' x '.join(map(str, size))} (channels, height, width)"


def _percentage(part: float, whole: float = 1) -> str:
    if part == 0:
        return "0"
    if part == whole:
        return "100"
    text = f"{100 * part / whole:.1f}"
    return {"0.0": "<0.1", "100.0": ">99.9"}.get(text, text)
