"""Durations counted in buckets, as Prometheus reads them."""

from bisect import bisect_left
from collections.abc import Sequence

__all__ = ["Histogram"]


class Histogram:
    """Counts durations; of fixed size. One thread observes, any may read.

    Attributes:
        bounds: upper ends of the buckets in seconds, ascending; one more has no upper end.
        counts: durations in each bucket, not those below it.
        total: sum of all durations in seconds.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds
