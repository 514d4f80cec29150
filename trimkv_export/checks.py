"""Checks of values that people give."""

import operator
from typing import Any

from trimkv_export.errors import OptionError, TrimKVError
from trimkv_export.words import shorten

__all__ = ["is_unicode", "require_whole"]


def is_unicode(text: str) -> bool:
    """Whether a text has no halves of surrogate pairs, which UTF-8 cannot write; JSON can name them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_whole(
    name: str,
    value: Any,
    low: int = 0,
    high: int | None = None,
    why: str = "",
    error: type[TrimKVError] = OptionError,
) -> int:
    """Return `value` as an int; NumPy's integers are taken, bool is not.

    Args:
        name: the name of the value in the message.
        value: what was given.
        low: least value that is allowed.
        high: largest value that is allowed; None is no limit.
        why: what follows the range in the message, such as ", what the package was built for".
        error: the type that is raised.

    Raises:
        TrimKVError: of the type `error`; the value is not a whole number in that range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise error(f"{name} must be a whole number {limits}{why}, got {shorten(value)}")
    return number
