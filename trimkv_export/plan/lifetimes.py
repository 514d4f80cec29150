"""Which tensors are alive together, and the peak of their bytes.

Time is the number of a step (a node of the graph in the order of execution). Where they lie is the runtime's to say:
ONNX Runtime and TensorRT take no offsets for activations.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

__all__ = ["Lifetime", "Peak", "peak", "spans"]


class Lifetime(NamedTuple):
    """A tensor of `nbytes` bytes that is there from step `first` to step `last`, both included."""

    name: str
    nbytes: int
    first: int
    last: int


class Peak(NamedTuple):
    """The most bytes alive at one step, the first such step, and what is alive then, largest first."""

    nbytes: int
    step: int
    tensors: tuple[Lifetime, ...]


def spans(
    steps: Sequence[tuple[Collection[str], Collection[str]]], kept: Collection[str] = ()
) -> dict[str, tuple[int, int]]:
    """The first and last step of each tensor: from the step that makes it to the last step that reads it.

    Args:
        steps: (names read, names made) in the order of execution. A tensor that is read and never made is there from
            the start.
        kept: tensors that stay to the end, such as the outputs.

    Raises:
        ValueError: a tensor is made twice.
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
    last |= dict.fromkeys(first.keys() & set(kept), max(len(steps) - 1, 0))
    return {name: (start, last[name]) for name, start in first.items()}


def peak(tensors: Collection[Lifetime]) -> Peak:
    """The peak; of nothing, 0 bytes at step 0."""
    change: dict[int, int] = {}
    for _, nbytes, first, last in tensors:
        change[first] = change.get(first, 0) + nbytes
        change[last + 1] = change.get(last + 1, 0) - nbytes
    alive = most = at = 0
    for step in sorted(change):
        alive += change[step]
        if alive > most:
            most, at = alive, step
    there = [tensor for tensor in tensors if most and tensor.nbytes and tensor.first <= at <= tensor.last]
    return Peak(most, at, tuple(sorted(there, key=lambda tensor: (-tensor.nbytes, tensor.first, tensor.name))))
