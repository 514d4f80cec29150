"""A weight on its way from a checkpoint into a package."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimkv_export.checkpoint import TensorInfo
from trimkv_export.errors import CheckpointError
from trimkv_export.graph import Weight
from trimkv_export.quantization.rounding import Adjustment, TakenPart

__all__ = ["Wanted"]


@dataclass(frozen=True)
class Wanted:
    """A weight to place.

    Attributes:
        source: where its bytes are.
        weight: what it is in the graph.
        data_file: the file that it goes to if it is converted.
        taken: for a tensor that is quantised already, the part of the weight that it becomes as a whole.
        adjustment: what calibration does to it before.
    """

    source: TensorInfo
    weight: Weight
    data_file: str
    taken: TakenPart | None = None
    adjustment: Adjustment | None = None

    @property
    def as_is(self) -> bool:
        """Whether the checkpoint's own bytes serve."""
        unchanged = self.weight.quantization is None and self.adjustment is None
        return unchanged and self.source.dtype == self.weight.dtype

    def check_scales(self, scales: NDArray[np.generic], rows: NDArray[np.float32]) -> None:
        """Raise CheckpointError unless the scales of some rows are finite."""
        if not np.isfinite(scales.astype(np.float32)).all():
            raise CheckpointError(
                f"{self.source.file}: {self.source.name} has values up to {np.abs(rows).max():g}, too large for scales "
                f"in {self.weight.dtype}; see whether the checkpoint is damaged, or build with --precision fp32"
            )

    @property
    def nbytes(self) -> int:
        """Bytes in the package; none of zero points that it goes without."""
        if self.taken is None:
            return self.weight.nbytes
        part = self.weight.part(self.taken.part)
        return sum(i.nbytes for i in self.weight.initializers if i.name == part)
