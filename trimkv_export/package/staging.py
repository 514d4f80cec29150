"""A folder that appears whole or not at all."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from trimkv_export.errors import OutputError
from trimkv_export.words import shorten

__all__ = ["require_free", "staged_folder", "writing"]

LONGEST_NAME = 200  # bytes; a hidden name has 26 more, and 255 are the limit
MOST_TRIES = 1000
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


def require_free(target: Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    """Refuse, before the work, a folder that `staged_folder` would refuse. Nothing is created.

    Raises:
        OutputError: as `staged_folder`.
    """
    target = target.absolute()
    with writing(target):
        _check_replaceable(target, overwrite, ours)


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool, ours: Callable[[Path], bool | str]) -> Iterator[Path]:
    """Yield an empty folder next to `target`; it is renamed to `target` at the end and removed on any failure.

    Nothing is forced to disk: that would take longer than the writing itself, and sizes and hashes tell a package that
    a power failure damaged. A killed process leaves a hidden folder that the next build of the same name removes: the
    lock on it died with its owner.

    Any number of processes may write the same target at a time. Of those that overwrite, each succeeds and the last
    one stays; of others one succeeds, and the rest are told that the target exists.

    Args:
        target: the folder that is to appear.
        overwrite: whether what is there may be replaced.
        ours: says of a folder that is not empty whether an overwrite may replace it; what we did not write stays. A
            text is the name of what somebody else put there.

    Raises:
        OutputError: `target` exists and may not be replaced, or cannot be written.
    """
    target = target.absolute()
    with writing(target):
        _check_replaceable(target, overwrite, ours)
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = _hidden_name(target)
        for stale in target.parent.glob(f"{glob.escape(hidden)}*"):
            _remove_if_abandoned(stale, target)
    with _locked_folder(target.parent / hidden, target) as stage, writing(target):
        yield stage
        stage.chmod(0o755)
        _swap(stage, target, overwrite, ours)


def _hidden_name(target: Path) -> str:
    """What the names of a target's hidden folders begin with, short enough for the rest where the target's is long."""
    name = target.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.building-"


@contextlib.contextmanager
def _locked_folder(beginning: Path, target: Path) -> Iterator[Path]:
    """A new folder, locked as long as this process uses it, and removed at the end if it is still there."""
    with contextlib.ExitStack() as stack:
        with writing(target):
            while True:
                folder = beginning.with_name(beginning.name + secrets.token_hex(8))
                # Before it is made: a signal may come at any moment.
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                folder.mkdir(mode=0o700)
                if _lock(folder, stack):
                    break
        yield folder


def _lock(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a folder that was just made. False: another build took it for abandoned, before it was locked."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    stack.callback(os.close, handle)
    fcntl.flock(handle, fcntl.LOCK_EX)
    if not _is_at(handle, folder):
        return False
    stack.callback(shutil.rmtree, folder, ignore_errors=True)  # again, so that it goes while it is still locked
    return True


def _is_at(handle: int, folder: Path) -> bool:
    """Whether an opened folder still has that name."""
    try:
        found = folder.stat()
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(handle))


def _check_replaceable(target: Path, overwrite: bool, ours: Callable[[Path], bool | str]) -> bool:
    """Whether there is something to be replaced. Raises OutputError where that may not be."""
    for _ in range(MOST_TRIES):
        try:
            handle = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            if not target.is_symlink():
                return False
            verdict: bool | str | None = None
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP) or not os.path.lexists(target):
                raise
            verdict = None
        else:
            try:
                with os.scandir(handle) as entries:
                    filled = next(entries, None) is not None
                verdict = filled and (ours(target) or None)
                if not _is_at(handle, target):
                    continue  # another build put its own in this place while we looked
            finally:
                os.close(handle)
        if verdict is None:
            raise OutputError(
                f"{target}: exists already; choose another --output (trimkv-export did not write it, so it is never "
                "replaced)"
            )
        if verdict and not overwrite:
            raise OutputError(f"{target}: exists already; choose another --output, or pass --overwrite")
        if isinstance(verdict, str):
            raise OutputError(
                f"{target}: holds {shorten(verdict)}, which trimkv-export did not write and an overwrite would delete; "
                "move it, or choose another --output"
            )
        return verdict
    raise _crowded(target)


def _crowded(target: Path) -> OutputError:
    return OutputError(f"{target}: other builds replaced it {MOST_TRIES} times meanwhile; build again when they ended")


def _remove_if_abandoned(stage: Path, target: Path) -> None:
    try:
        handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # its build has ended; or it is somebody else's
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (stage / OLD).exists() and not target.exists():
            (stage / OLD).rename(target)  # killed between the two renames of _swap
        shutil.rmtree(stage, ignore_errors=True)
    except OSError:
        pass  # another build is at work: on the folder, or it has put its own package in place
    finally:
        os.close(handle)


def _swap(stage: Path, target: Path, overwrite: bool, ours: Callable[[Path], bool | str]) -> None:
    """Rename the stage to the target. Each step is tried again where another build came in between."""
    for _ in range(MOST_TRIES):
        stage.stat()  # raises where somebody removed it
        if not _check_replaceable(target, overwrite, ours):
            if _renamed(stage, target):  # over an empty folder, too
                return
            continue
        with _locked_folder(target.parent / _hidden_name(target), target) as aside:
            try:
                if _renamed(target, aside / OLD) and _renamed(stage, target):
                    return
            except BaseException:
                _renamed(aside / OLD, target)  # where it was moved, and nothing has its place
                raise
    raise _crowded(target)


def _renamed(source: Path, target: Path) -> bool:
    """Rename a folder; False where another build was faster: the source has gone, or the target is there."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True
