"""Every error a user can meet, one exception tree.

    TrimKVError                exit code  1   anything below
    ├── OptionError                       2   an option or argument with a bad value
    ├── CheckpointError                   3   a backbone or gates that is missing, incomplete, corrupt or inconsistent
    │   └── DownloadError                 4   the model hub cannot be reached, or has no such repository or file
    ├── UnsupportedModelError             5   a model family, gate kind or model option this version does not know
    ├── PackageError                      6   a package that is not one, was changed, or is of another version
    ├── OutputError                       7   writing failed: disk full, no permission, target exists
    ├── EngineError                       8   this machine cannot run the package as asked
    ├── VerificationError                 9   `verify` found a difference
    ├── MissingDependencyError           10   a Python package of an extra is not installed
    └── DoesNotFitError                  11   a model does not fit the device, by its plan

The message is one sentence or two: what is wrong, with the bad value quoted, and what to do. The command line prints
the message and ends with the exit code; 130 is Ctrl-C, 143 is SIGTERM, and 141 says that the reader of stdout went away
before the end.
`plan` ends with 11 after its report, which says what would fit.
"""

__all__ = [
    "CheckpointError",
    "DoesNotFitError",
    "DownloadError",
    "EngineError",
    "MissingDependencyError",
    "OptionError",
    "OutputError",
    "PackageError",
    "TrimKVError",
    "UnsupportedModelError",
    "VerificationError",
    "missing",
]


class TrimKVError(Exception):
    """Base of every error a user can cause or meet."""

    exit_code = 1


class OptionError(TrimKVError, ValueError):
    """An option or argument has a value that cannot be used."""

    exit_code = 2


class CheckpointError(TrimKVError):
    """A checkpoint is missing, incomplete, corrupt or inconsistent."""

    exit_code = 3


class DownloadError(CheckpointError):
    """The model hub cannot be reached, or has no such repository or file."""

    exit_code = 4


class UnsupportedModelError(TrimKVError):
    """A model family, gate kind or model option that this version does not know."""

    exit_code = 5


class PackageError(TrimKVError):
    """A folder is not a package, was changed after it was built, or is of another format version."""

    exit_code = 6


class OutputError(TrimKVError):
    """Writing failed: disk full, no permission, or the target exists."""

    exit_code = 7


class EngineError(TrimKVError):
    """This machine cannot run the package as asked."""

    exit_code = 8


class VerificationError(TrimKVError):
    """`verify` found a difference."""

    exit_code = 9


class MissingDependencyError(TrimKVError, ImportError):
    """A Python package that an extra brings is not installed."""

    exit_code = 10


class DoesNotFitError(TrimKVError):
    """A model does not fit the device that it is for, by its plan."""

    exit_code = 11


def missing(what: str, package: str, extra: str) -> MissingDependencyError:
    """The error of a Python package that is not installed.

    Args:
        what: the subject of the message: what needs the package, such as "--plot" or "running a package".
        package: its name.
        extra: the extra of trimkv-export that brings it; several are separated by commas.
    """
    return MissingDependencyError(
        f"{what} needs the Python package {package}; install it with: pip install 'trimkv-export[{extra}]'"
    )
