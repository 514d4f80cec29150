"""Values in words, for messages and reports."""

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ["amount", "did_you_mean", "first_line", "shorten"]


def amount(nbytes: float) -> str:
    """Bytes in words with decimal units, as disks and the papers count: 43.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def shorten(value: Any, most: int = 60) -> str:
    """A value as Python writes it, cut to `most` characters: what an error quotes of somebody's input."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # lists in lists in lists; a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}…"


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's message, cut to `most` characters; the error's type where there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def did_you_mean(name: str, known: Iterable[str], *, most: int = 3, cutoff: float = 0.6) -> str:
    """ "did you mean 'a' or 'b'?", or "" where nothing known looks like `name`."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""
