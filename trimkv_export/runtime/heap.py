"""Memory that pictures took goes back to the system when they are freed: settings of glibc's malloc.

A picture comes and goes in blocks of megabytes: its pixels, patches and the vision tower's activations. glibc maps a
large block on its own and unmaps it when it is freed; but it moves the border between small and large up to the
largest block freed so far (32 MB at most) and takes later blocks below it from its heap, where holes stay resident.
Of 8,000 image tokens 68 to 188 MB stayed (benchmarks/RESULTS.md). ONNX Runtime's arena, emptied after each call,
does not help, as most of the blocks are not its own; neither does trimming alone, as callers free pictures later.
"""

import ctypes
import os
from collections.abc import Callable

__all__ = ["keep_border", "trim"]

# Parameters of mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LEAST_BORDER = 128 << 10  # where glibc starts
PAGE = 4096
# What stays free at the end of the heap for the next step of decoding, in borders.
BORDERS_KEPT = 8


def keep_border(vocab_size: int) -> bool:
    """Fix the border for the whole process, so that the caller's pictures go back too; returns whether it was done.

    It lies above the arrays that sampling makes for each token, of 8 bytes for each of `vocab_size` entries: were
    those mapped anew each time, drawing a token from 150,000 took 6 ms in place of 1.

    Where the environment sets a border it stays. Another C library is left alone.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = _function("mallopt")
    border = max(LEAST_BORDER, 8 * vocab_size + PAGE)
    return (
        mallopt is not None
        and mallopt(M_MMAP_THRESHOLD, border) == 1
        and mallopt(M_TRIM_THRESHOLD, BORDERS_KEPT * border) == 1
    )


def trim() -> None:
    """Give back what is free in the heap: blocks below the border. Takes a millisecond or a few."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _function(name: str) -> Callable[..., int] | None:
    """A function of the C library, None where it has none of this name."""
    found: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return found
