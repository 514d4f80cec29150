"""The standard streams as people leave them: closed, full, or with a reader that has gone away."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from trimkv_export.errors import OutputError, TrimKVError

__all__ = ["ReaderGone", "output_errors", "say", "silence", "standard_streams", "visible"]

# All but tab and newline, and what turns the direction of writing.
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# What the write of a full, broken or closed file ends with.
WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EROFS, errno.ENXIO}


class ReaderGone(Exception):  # noqa: N818 (it is no error)
    """Who read stdout has gone away, as `| head` does: nobody wants the rest."""


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Around a command: the three descriptors are open, so that no other file gets one of their numbers.

    Raises:
        OutputError: stdout is closed, so what the command prints would be lost without a word.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    closed = sys.stderr
    try:
        if sys.stderr is None:
            sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        if sys.stdout is None:
            raise OutputError("stdout is closed, so the result would be lost: open it, or send it to /dev/null")
        yield
    finally:
        sys.stderr = closed


@contextlib.contextmanager
def output_errors() -> Iterator[None]:
    """Around all that prints: what the system says of a file becomes one of our errors.

    Raises:
        ReaderGone: in place of BrokenPipeError.
        OutputError: the disk is full, or stdout cannot be written.
        TrimKVError: anything else that the system says of a file, which is named.
    """
    try:
        yield
    except BrokenPipeError:
        silence(sys.stdout)
        raise ReaderGone from None
    except OSError as error:
        if error.filename is not None:
            raise TrimKVError(f"{error.filename}: {error.strerror}") from None
        if error.errno == errno.ENOENT and _folder_is_gone():
            raise TrimKVError("the folder that this command was started in is gone: change to another one") from None
        if error.errno not in WRITING:
            raise
        silence(sys.stdout)
        raise OutputError(f"stdout: cannot be written: {error.strerror}") from None


def _folder_is_gone() -> bool:
    """Whether the folder that this process stands in was removed."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def silence(stream: Any) -> None:
    """Send a stream to /dev/null: what is still in its buffer would fail once more when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def visible(text: str) -> str:
    """A text for a terminal, which takes control characters for commands: what a stranger wrote has them escaped."""
    return CONTROLS.sub(lambda found: repr(found.group())[1:-1], text)


def say(text: str) -> None:
    """Write a line to stderr. Where it cannot be written, nobody reads it, and the command goes on."""
    try:
        click.echo(visible(text), err=True)
    except OSError:
        silence(sys.stderr)
