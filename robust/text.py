"""How what the gate says is written: text from files made harmless, changes in points, p-values."""

import math
import re

# Control characters, halves of surrogate pairs, and the two code points that are no characters: of these XML 1.0 holds
# only three. Then the marks that turn the direction of writing, which make a text look like another.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """`text` on one line, with what could not be seen as a symbol: '\\n' as '␊', '\\x1b' as '␛', others as '\ufffd'."""
    return _INVISIBLE.sub(lambda match: _symbol(ord(match[0])), text)


def format_points(share: float) -> str:
    """A change in percentage points, with a true minus sign: '−8.2'; '0' only if it is exactly that."""
    if share == 0:
        return "0"
    text = f"{100 * share:+.1f}"
    return (f"{100 * share:+.1g}" if float(text) == 0 else text).replace("-", "−")


def format_p(p_value: float) -> str:
    """'p < 0.001', or two digits: 'p = 0.034'; more where these would put it at 0.05: 'p = 0.0501'."""
    digits = 2
    while p_value != 0.05 and float(f"{p_value:.{digits}g}") == 0.05:
        digits += 1
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.{digits}g}"


def format_bare_p(p_value: float) -> str:
    """The same for a column that is called p: '< 0.001', '0.034'; '–' for NaN."""
    return "–" if math.isnan(p_value) else format_p(p_value).removeprefix("p ").removeprefix("= ")


def _symbol(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "\ufffd"
