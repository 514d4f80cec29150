"""A folder that appears whole or not at all."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from trimkv_export.errors import OutputError

__all__ = ["staged_folder", "writing"]

OLD = "old"  # name of a replaced package in a stage folder, until the new one is in place


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one OutputError, which names the target."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(target)).free
            raise OutputError(
                f"{target}: the disk is full ({free:,} bytes free); nothing was left behind: free some space and build "
                "again"
            ) from None
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from None


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder next to `target`; it is renamed to `target` at the end and removed on any failure.

    Nothing is forced to disk: that would take longer than the writing itself, and sizes and hashes tell a package that
    a power failure damaged. A killed process leaves a hidden folder that the next build of the same name removes: the
    lock on it died with its owner.

    Args:
        target: the folder that appears.
        overwrite: replace an earlier one.
        ours: says of a folder that is not empty whether an overwrite may replace it; what we did not write stays.

    Raises:
        OutputError: `target` exists and may not be replaced, or cannot be written.
    """
    target = target.absolute()
    _check_replaceable(target, overwrite, ours)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f".{glob.escape(target.name)}.building-*"):
            _remove_if_abandoned(stale, target)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.building-", dir=target.parent))
    lock = os.open(stage, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with writing(target):
            yield stage
            stage.chmod(0o755)
            _check_replaceable(target, overwrite, ours)  # it may have appeared meanwhile
            _swap(stage, target)
    finally:
        os.close(lock)
        shutil.rmtree(stage, ignore_errors=True)


def _check_replaceable(target: Path, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not target.is_dir() or not ours(target):
        raise OutputError(
            f"{target}: exists already; choose another --output (trimkv-export did not write it, so it is never "
            "replaced)"
        )
    if not overwrite:
        raise OutputError(f"{target}: exists already; choose another --output, or pass --overwrite")


def _remove_if_abandoned(stage: Path, target: Path) -> None:
    try:
        handle = os.open(stage, os.O_RDONLY)
    except FileNotFoundError:
        return  # its build has ended
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (stage / OLD).exists() and not target.exists():
            (stage / OLD).rename(target)  # killed between the two renames of _swap
        shutil.rmtree(stage, ignore_errors=True)
    except BlockingIOError:
        pass  # another build is at work
    finally:
        os.close(handle)


def _swap(stage: Path, target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.building-", dir=target.parent))
        target.rename(old / OLD)
        try:
            stage.rename(target)
        except BaseException:
            (old / OLD).rename(target)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        stage.rename(target)
