"""What `run` and `bench` write to stderr when there is nothing else to say."""

from trimkv_export.backends.native import find_library
from trimkv_export.cli.console import PORTABLE

__all__ = ["QUIET"]

QUIET = "" if find_library() else f"{PORTABLE}\n"
