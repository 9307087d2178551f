"""File names as text: a name may hold line breaks, and bytes that are not UTF-8, which Python keeps as surrogates."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from robust.errors import InputError

# Control characters, the other line separators, and surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def sample_id(name: str) -> str:
    """`one_line`, and for two names never the same: a backslash of the name itself is doubled."""
    return one_line(name.replace("\\", "\\\\"))


def one_line(text: str) -> str:
    r"""Valid text on one line: a line feed as \n, the byte 255 as \xff, U+2028 as \u2028; other text as it is."""
    return _UNPRINTABLE.sub(lambda match: _escaped(match[0]), text)


@contextmanager
def errors_on_one_line() -> Iterator[None]:
    """InputErrors from inside name files by `one_line`."""
    try:
        yield
    except InputError as error:
        error.args = (one_line(str(error)),)
        raise


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:x}"
    # Not \x above 127, where it stands for a byte.
    return character.encode("unicode_escape").decode() if code < 0x80 else f"\\u{code:04x}"
