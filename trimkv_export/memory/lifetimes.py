"""Which tensors are alive together: the peak of their bytes, and places for them in one block without overlap.

Time is the number of a step (a node of the graph in the order of execution). Finding the smallest block is NP-hard
(dynamic storage allocation); `place` is the usual heuristic, largest tensors first, each in the gap that fits it best.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from trimkv_export.memory.slab import ALIGNMENT

__all__ = ["Lifetime", "Peak", "Placement", "lifetimes_of", "peak", "place"]

BUCKETS = 256  # parts of the time line; a tensor is compared with those of the parts that it lives in


@dataclass(frozen=True)
class Lifetime:
    """A tensor that is there from step `first` to step `last`, both included. Raises ValueError if that cannot be."""

    name: str
    nbytes: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if self.nbytes < 0 or self.last < self.first:
            raise ValueError(f"{self.name!r}: {self.nbytes} bytes from step {self.first} to {self.last} cannot be")

    def meets(self, other: "Lifetime") -> bool:
        """Whether there is a step at which both are alive."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Peak:
    """The most bytes alive at one step, the first such step, and what is alive then, largest first."""

    nbytes: int
    step: int
    tensors: tuple[Lifetime, ...]


@dataclass(frozen=True)
class Placement:
    """Where each tensor begins, and the size of the block that holds them all."""

    offsets: Mapping[str, int]
    nbytes: int


def lifetimes_of(
    steps: Sequence[tuple[Collection[str], Collection[str]]], sizes: Mapping[str, int], kept: Collection[str] = ()
) -> list[Lifetime]:
    """Lifetimes of the tensors that steps make: from the step that makes one to the last step that reads it.

    steps: (names read, names made) in the order of execution.
    sizes: bytes; tensors without a size (weights, inputs that live elsewhere, outputs bound in place) are left out.
    kept: tensors that stay to the end, such as the outputs. A tensor that is read and never made is there from the
        start.

    Raises ValueError if a tensor is made twice.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for step, (read, made) in enumerate(steps):
        for name in read:
            first.setdefault(name, 0)
            last[name] = step
        for name in made:
            if name in first:
                raise ValueError(f"step {step} makes {name!r}, which is there already")
            first[name] = last[name] = step
    end = max(len(steps) - 1, 0)
    return [
        Lifetime(name, sizes[name], start, end if name in kept else last[name])
        for name, start in first.items()
        if name in sizes
    ]


def peak(lifetimes: Iterable[Lifetime]) -> Peak:
    """The peak; of nothing, 0 bytes at step 0."""
    tensors = list(lifetimes)
    change: dict[int, int] = {}
    for tensor in tensors:
        change[tensor.first] = change.get(tensor.first, 0) + tensor.nbytes
        change[tensor.last + 1] = change.get(tensor.last + 1, 0) - tensor.nbytes
    alive = most = at = 0
    for step in sorted(change):
        alive += change[step]
        if alive > most:
            most, at = alive, step
    there = [tensor for tensor in tensors if most and tensor.nbytes and tensor.first <= at <= tensor.last]
    return Peak(most, at, tuple(sorted(there, key=lambda tensor: (-tensor.nbytes, tensor.first, tensor.name))))


def place(lifetimes: Iterable[Lifetime], alignment: int = ALIGNMENT) -> Placement:
    """Give every tensor an offset, a multiple of `alignment`; tensors alive at one step do not overlap.

    The block is never smaller than the peak. Seen: 1.0002 times the peak for a decoder of 36 layers; for 150 random
    sets of 200 tensors 1.03 times on average, 1.2 times at most. No such factor holds for every set.

    Raises ValueError if two tensors have one name.
    """
    tensors = list(lifetimes)
    names = {tensor.name for tensor in tensors}
    if len(names) != len(tensors):
        raise ValueError("two tensors have one name")
    orders = (
        sorted(tensors, key=lambda tensor: (-tensor.nbytes, tensor.first - tensor.last, tensor.first, tensor.name)),
        sorted(tensors, key=lambda tensor: (tensor.first - tensor.last, -tensor.nbytes, tensor.first, tensor.name)),
    )
    return min((_place_in_order(order, alignment) for order in orders), key=lambda placement: placement.nbytes)


def _place_in_order(tensors: Sequence[Lifetime], alignment: int) -> Placement:
    offsets: dict[str, int] = {}
    extent = 0
    start = min((tensor.first for tensor in tensors), default=0)
    end = max((tensor.last for tensor in tensors), default=0)
    width = (end - start) // BUCKETS + 1
    placed: list[list[tuple[int, int, Lifetime]]] = [[] for _ in range(BUCKETS)]
    for tensor in tensors:
        buckets = placed[(tensor.first - start) // width : (tensor.last - start) // width + 1]
        near = {entry for bucket in buckets for entry in bucket if entry[2].meets(tensor)}
        offset = _best_gap(sorted((begin, stop) for begin, stop, _ in near), tensor.nbytes, alignment)
        offsets[tensor.name] = offset
        extent = max(extent, offset + tensor.nbytes)
        if tensor.nbytes:
            for bucket in buckets:
                bucket.append((offset, offset + tensor.nbytes, tensor))
    return Placement(offsets, extent)


def _best_gap(taken: Sequence[tuple[int, int]], nbytes: int, alignment: int) -> int:
    """The start of the smallest gap between `taken` (begin, end), sorted, that holds `nbytes`; else behind them all."""
    best, least, free = None, 0, 0
    for begin, end in taken:
        gap = begin - free
        if gap >= nbytes and (best is None or gap < least):
            best, least = free, gap
        free = max(free, -(-end // alignment) * alignment)
    return free if best is None else best
