"""How a run ends that cannot begin, or go on."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(Exception):
    """The input or an option is wrong. The message is one line: what is wrong, and how to mend it.

    The command line prints it on stderr and exits with 2, without a traceback.
    """


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> InputError:
    """An InputError for a name that is not in the catalogue, with the nearest names that are."""
    known = list(known)
    by_folded = {candidate.lower(): candidate for candidate in known}
    near = [by_folded[match] for match in get_close_matches(name.lower(), by_folded, n=3, cutoff=0.5)]
    suggestion = (
        f"; did you mean {' or '.join(near)}?"
        if near
        else f"; known: {', '.join(known[:12])}{', ...' * (len(known) > 12)}"
    )
    return InputError(f"unknown {kind} {name!r}{suggestion}{' ' + hint if hint else ''}")
