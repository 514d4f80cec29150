"""Quantised weights in the package's formats (graph/functions/quantized.py): rounded here, or taken as they are."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimkv_export.checkpoint import StoredQuantization, TensorInfo
from trimkv_export.checkpoint.tensors import numpy_dtype
from trimkv_export.config import BuildOptions, PlanOptions, Quantization
from trimkv_export.errors import CheckpointError, OptionError
from trimkv_export.graph import Weight

__all__ = ["TakenPart", "chosen_quantization", "pack", "quantize"]

Rows = NDArray[np.float32]
ROW_BLOCK = 128  # columns of a block where a whole row has one scale


def chosen_quantization(
    options: BuildOptions | PlanOptions, stored: StoredQuantization | None, where: Path
) -> Quantization | None:
    """How linear layers are stored in the package: as the options say, or as the checkpoint (`where`) is already.

    Raises OptionError when the options want such a checkpoint in another precision.
    """
    if stored is None:
        return options.quantization
    if options.precision != f"int{stored.bits}":
        raise OptionError(
            f"{where}: this checkpoint is quantised to int{stored.bits} already ({stored.method}); build it with "
            f"--precision int{stored.bits}, or take the original for {options.precision}"
        )
    size = stored.group_size or ROW_BLOCK
    head = options.quantize_head is True
    return Quantization(stored.bits, size, stored.group_size is None, symmetric=not stored.zeros, head=head)


@dataclass(frozen=True)
class TakenPart:
    """A tensor of a checkpoint that is quantised already, on its way into a package, bit for bit.

    part: what of the weight it is: qweight, scales or qzeros.
    """

    part: str
    stored: StoredQuantization

    def convert(self, data: bytes, source: TensorInfo, weight: Weight) -> NDArray[np.generic]:
        """The part in the package's format, of the source's bytes.

        Raises CheckpointError for a zero point out of range, or a scale that the package's type does not hold exactly.
        """
        array = np.frombuffer(data, numpy_dtype(source.dtype)).reshape(source.shape)
        if self.part == "qweight":
            return pack(self.stored.numbers(array), self.stored.bits)
        if self.part == "qzeros":
            name = f"{source.file}: {source.name}"
            zeros = self._by_block(self.stored.zero_points(array, name), weight).astype(np.uint8)
            return pack(zeros, self.stored.bits)
        scales = self._by_block(self.stored.scales(array), weight)
        with np.errstate(over="ignore"):
            found = scales.astype(numpy_dtype(weight.dtype))
        if (found.astype(np.float32) != scales.astype(np.float32)).any():
            raise CheckpointError(
                f"{source.file}: {source.name} has scales in {source.dtype} that {weight.dtype} does not hold exactly; "
                "build with --activations fp32"
            )
        return np.ascontiguousarray(found)

    def _by_block(self, values: NDArray[np.generic], weight: Weight) -> NDArray[np.generic]:
        """Values [N, G], those of whole rows repeated for every block."""
        if self.stored.group_size is not None:
            return values
        return np.repeat(values, weight.shape[1] // ROW_BLOCK, axis=1)


def quantize(rows: Rows, quantization: Quantization, scale_dtype: np.dtype) -> dict[str, NDArray[np.generic]]:
    """Rows [R, K] -> qweight [R, K·bits/8] and qzeros [R, ⌈blocks·bits/8⌉] uint8, scales [R, blocks].

    Symmetric: the scale is the least with which the largest and the smallest value of the block fit in −2^(bits−1) …
    2^(bits−1) − 1. Else the block's range, 0 included, is spread over all 2^bits numbers. Numbers are rounded with the
    scale as it is stored, in `scale_dtype`. With `per_row` the whole row is one block, and its scale is repeated.
    """
    levels, half = 1 << quantization.bits, 1 << (quantization.bits - 1)
    blocks = rows.reshape(len(rows), -1, quantization.block_size)
    axes = (1, 2) if quantization.per_row else 2
    low, high = (np.asarray(found(blocks, axis=axes, keepdims=True)) for found in (np.min, np.max))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    exact = np.maximum(high / (half - 1), low / -half) if quantization.symmetric else (high - low) / (levels - 1)
    scales = exact.astype(scale_dtype)
    step = scales.astype(np.float32)
    step[step == 0] = 1  # a block of zeros, or too small for the type
    zeros = np.full_like(step, half) if quantization.symmetric else np.clip(np.rint(-low / step), 0, levels - 1)
    numbers = np.clip(np.rint(blocks / step) + zeros, 0, levels - 1).astype(np.uint8)
    shape = len(rows), blocks.shape[1]
    parts: dict[str, NDArray[np.generic]] = {
        "qweight": pack(numbers.reshape(len(rows), -1), quantization.bits),
        "scales": np.ascontiguousarray(np.broadcast_to(scales[..., 0], shape)),
    }
    if not quantization.symmetric:
        found = np.broadcast_to(zeros[..., 0], shape).astype(np.uint8)
        parts["qzeros"] = pack(found, quantization.bits)
    return parts


def pack(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers [R, n] side by side: 4 bits two to a byte, the even one in the low half, and a last one alone."""
    if bits == 8:
        return np.ascontiguousarray(numbers)
    if numbers.shape[1] % 2:
        numbers = np.pad(numbers, ((0, 0), (0, 1)))
    return np.ascontiguousarray(numbers[:, ::2] | np.left_shift(numbers[:, 1::2], 4, dtype=np.uint8))
