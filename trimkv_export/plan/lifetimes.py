"""Which tensors are alive together, and the peak of their bytes.

Time is the number of a step (a node of the graph in the order of execution). Where they lie is the runtime's to say:
ONNX Runtime and TensorRT take no offsets for activations.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Lifetime", "Peak", "lifetimes_of", "peak"]


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


@dataclass(frozen=True)
class Peak:
    """The most bytes alive at one step, the first such step, and what is alive then, largest first."""

    nbytes: int
    step: int
    tensors: tuple[Lifetime, ...]


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
