"""Quantised weights in the package's formats (graph/functions/quantized.py): rounded here, or taken as they are."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimkv_export.checkpoint import StoredQuantization, TensorInfo
from trimkv_export.checkpoint.tensors import numpy_dtype
from trimkv_export.config import BuildOptions, PlanOptions, Quantization
from trimkv_export.errors import CheckpointError, OptionError
from trimkv_export.graph import Weight

__all__ = ["Adjustment", "TakenPart", "chosen_quantization", "pack", "quantize", "rounding_error"]

Rows = NDArray[np.float32]
ROW_BLOCK = 128  # columns of a block where a whole row has one scale
TENSORRT_BLOCKS = (64, 128)  # of int4, what its kernels are for
CLIPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of a block's range that are tried, after the whole


def chosen_quantization(
    options: BuildOptions | PlanOptions, stored: StoredQuantization | None, where: Path
) -> Quantization | None:
    """How linear layers are stored in the package: as the options say, or as the checkpoint (`where`) is already.

    Raises:
        OptionError: the options want such a checkpoint in another precision, or the target cannot run it.
    """
    found = options.quantization if stored is None else _taken_quantization(options, stored, where)
    if found is None or not options.target.decodes_in_tensorrt:
        return found
    if found.symmetric and (found.per_row if found.bits == 8 else found.block_size in TENSORRT_BLOCKS):
        return replace(found, qdq=True)
    zeros = "without" if found.symmetric else "with"
    size = "one scale a row" if found.per_row else f"blocks of {found.block_size}"
    original = "" if stored is None else f"take the original of this checkpoint ({stored.method}) and "
    raise OptionError(
        f"{options.model}: int{found.bits} with {size}, {zeros} zero points, does not run on TensorRT, which takes "
        "int4 in blocks of 64 or 128 and int8 with one scale a row, both without zero points; "
        f"{original}build with --precision int4 --symmetric --block-size 128, or --precision int8 --symmetric"
    )


def _taken_quantization(options: BuildOptions | PlanOptions, stored: StoredQuantization, where: Path) -> Quantization:
    """As the checkpoint is."""
    if options.precision != f"int{stored.bits}":
        raise OptionError(
            f"{where}: this checkpoint is quantised to int{stored.bits} already ({stored.method}); build it with "
            f"--precision int{stored.bits}, or take the original for {options.precision}"
        )
    size = stored.group_size or ROW_BLOCK
    head = options.quantize_head is True
    # That the zero points are those that TensorRT does without is checked while the weights are taken.
    symmetric = not stored.zeros or (stored.middle_zeros and options.target.decodes_in_tensorrt)
    return Quantization(stored.bits, size, stored.group_size is None, symmetric=symmetric, head=head)


@dataclass(frozen=True)
class TakenPart:
    """A tensor of a checkpoint that is quantised already, on its way into a package, bit for bit.

    Attributes:
        part: what it is of the weight: qweight, scales or qzeros; or the whole weight, for one that is kept in float,
            since its columns do not divide into blocks.
        stored: how the checkpoint is quantised.
        scales, zeros: of the whole weight, the other tensors that it is made of.
    """

    part: str
    stored: StoredQuantization
    scales: TensorInfo | None = None
    zeros: TensorInfo | None = None

    def convert(self, data: bytes, source: TensorInfo, weight: Weight) -> NDArray[np.generic] | None:
        """The part in the package's format, of the source's bytes; None for zero points that the package leaves out.

        Raises:
            CheckpointError: a zero point is not what config.json says; a scale is not above 0 where TensorRT is to take
                it, or not exact in the package's type.
        """
        name = f"{source.file}: {source.name}"
        array = np.frombuffer(data, numpy_dtype(source.dtype)).reshape(source.shape)
        if self.scales is not None:
            return self._values(array, self.scales, weight)
        if self.part == "qweight":
            return pack(self.stored.numbers(array, weight.shape), self.stored.bits, signed=_is_qdq(weight))
        if self.part == "qzeros":
            zeros = self.stored.zero_points(array, weight.shape[0], name)
            if weight.quantization is not None and weight.quantization.symmetric:
                return None  # all are in the middle, as config.json says
            return pack(self._by_block(zeros, weight).astype(np.uint8), self.stored.bits)
        scales = self._by_block(self.stored.scales(array), weight)
        # Negative ones are ordinary: AutoRound writes them where the largest value of a block is above 0.
        values = scales.astype(np.float32)
        if _is_qdq(weight) and (values <= 0).any():
            raise CheckpointError(
                f"{name} has a scale of {values[values <= 0][0]:g}, and TensorRT takes those above 0 only; build for "
                "--target onnxruntime"
            )
        with np.errstate(over="ignore"):
            found = scales.astype(numpy_dtype(weight.dtype))
        if (found.astype(np.float32) != values).any():
            raise CheckpointError(
                f"{name} has scales in {source.dtype} that {weight.dtype} does not hold exactly; "
                "build with --activations fp32"
            )
        return np.ascontiguousarray(found)

    def _values(self, packed: NDArray[np.generic], scales: TensorInfo, weight: Weight) -> NDArray[np.generic]:
        """What the numbers stand for, in float: exact in float32, rounded in other types."""
        rows, columns = weight.shape
        group = np.arange(columns) // (self.stored.group_size or columns)
        found = self.stored.scales(scales.read()).astype(np.float32)[:, group]
        middle = np.full((rows, 1), 1 << (self.stored.bits - 1), np.float32)
        zeros = middle
        if self.zeros is not None:
            name = f"{self.zeros.file}: {self.zeros.name}"
            zeros = self.stored.zero_points(self.zeros.read(), rows, name).astype(np.float32)[:, group]
        with np.errstate(over="ignore", invalid="ignore"):
            values = ((self.stored.numbers(packed, weight.shape) - zeros) * found).astype(numpy_dtype(weight.dtype))
        if not np.isfinite(values.astype(np.float32)).all():
            raise CheckpointError(
                f"{scales.file}: {scales.name} has scales that are not finite, or too large for {weight.dtype}; fetch "
                "the checkpoint again, or build with --activations fp32"
            )
        return np.ascontiguousarray(values)

    def _by_block(self, values: NDArray[np.generic], weight: Weight) -> NDArray[np.generic]:
        """Values [N, G], those of whole rows repeated for every block; once for DequantizeLinear."""
        if self.stored.group_size is not None or _is_qdq(weight):
            return values
        size = weight.quantization.block_size if weight.quantization else ROW_BLOCK
        return np.repeat(values, weight.shape[1] // size, axis=1)


@dataclass(frozen=True, eq=False)
class Adjustment:
    """What calibration does to a tensor before it is converted or rounded (quantization/calibration.py).

    Attributes:
        rows: factors of its rows [N]; those of a vector are rows.
        columns: factors of its columns [K].
        importance: of a matrix that is rounded, how much the square of an error in each column counts [K].
    """

    rows: Rows | None = None
    columns: Rows | None = None
    importance: Rows | None = None

    def apply(self, values: Rows, start: int) -> Rows:
        """Rows [R, K] of the tensor, the first of which is row `start`, scaled."""
        if self.rows is not None:
            values = values * self.rows[start : start + len(values), None]
        return values if self.columns is None else values * self.columns


def quantize(
    rows: Rows, quantization: Quantization, scale_dtype: np.dtype, importance: Rows | None = None
) -> dict[str, NDArray[np.generic]]:
    """Rows [R, K] -> qweight [R, K·bits/8] and qzeros [R, ⌈blocks·bits/8⌉] uint8, scales [R, blocks].

    Symmetric: the scale is the least with which the largest and the smallest value of the block fit in −2^(bits−1) …
    2^(bits−1) − 1. Else the block's range, 0 included, is spread over all 2^bits numbers. Numbers are rounded with the
    scale as it is stored, in `scale_dtype`. With `per_row` the whole row is one block, and its scale is repeated.
    With `qdq` numbers are signed, scales of rows come once, [R, 1], and none is 0: TensorRT wants positive ones.

    Args:
        rows: whole rows of the matrix.
        quantization: the format.
        scale_dtype: of the scales.
        importance: [K], weights of the columns' squared errors; then of each block the share of its range is taken, of
            1 and `CLIPS`, that makes the least error, and what lies beyond is cut off. None takes the whole range.
    """
    found = _rounded(rows, quantization, scale_dtype, importance)
    blocks, scales = found.numbers.shape[1], found.scales
    if quantization.qdq:
        scales = np.where(scales == 0, np.ones_like(scales), scales)
    shape = len(rows), 1 if quantization.qdq and quantization.per_row else blocks
    parts: dict[str, NDArray[np.generic]] = {
        "qweight": pack(found.numbers.reshape(len(rows), -1), quantization.bits, signed=quantization.qdq),
        "scales": np.ascontiguousarray(np.broadcast_to(scales[..., 0], shape)),
    }
    if not quantization.symmetric:
        zeros = np.broadcast_to(found.zeros[..., 0], shape).astype(np.uint8)
        parts["qzeros"] = pack(zeros, quantization.bits)
    return parts


def rounding_error(rows: Rows, quantization: Quantization, scale_dtype: np.dtype, importance: Rows) -> float:
    """Σ importance · (rounded − row)² over all of rows [R, K], of whole ranges; importance [K]."""
    found = _rounded(rows, quantization, scale_dtype)
    return float(found.error(rows, importance, (0, 1, 2)).item())


@dataclass(frozen=True, eq=False)
class _Rounded:
    """numbers [R, blocks, size] uint8; scales, as stored, and zeros: of blocks [R, blocks, 1] or of rows [R, 1, 1]."""

    numbers: NDArray[np.uint8]
    scales: NDArray[np.generic]
    zeros: Rows

    def error(self, rows: Rows, importance: Rows, axes: tuple[int, ...]) -> Rows:
        """Σ importance · (what numbers stand for − row)² along `axes`, which stay."""
        values = (self.numbers - self.zeros) * self.scales.astype(np.float32)
        values -= rows.reshape(values.shape)
        values *= values
        values *= importance.reshape(values.shape[1:])
        return np.asarray(values.sum(axis=axes, keepdims=True))


def _rounded(rows: Rows, quantization: Quantization, scale_dtype: np.dtype, importance: Rows | None = None) -> _Rounded:
    levels, half = 1 << quantization.bits, 1 << (quantization.bits - 1)
    blocks = rows.reshape(len(rows), -1, quantization.block_size)
    axes = (1, 2) if quantization.per_row else (2,)
    low, high = (np.asarray(found(blocks, axis=axes, keepdims=True)) for found in (np.min, np.max))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    exact = np.maximum(high / (half - 1), low / -half) if quantization.symmetric else (high - low) / (levels - 1)

    def within(share: float) -> _Rounded:
        with np.errstate(over="ignore"):  # the caller looks at scales that are not finite
            scales = (exact * np.float32(share)).astype(scale_dtype)
        step = scales.astype(np.float32)
        step[step == 0] = 1  # a block of zeros, or too small for the type
        zeros = np.full_like(step, half)
        if not quantization.symmetric:
            zeros = np.clip(np.rint(-low * np.float32(share) / step), 0, levels - 1)
        return _Rounded(np.clip(np.rint(blocks / step) + zeros, 0, levels - 1).astype(np.uint8), scales, zeros)

    best = within(1)
    if importance is None:
        return best
    least = best.error(rows, importance, axes)
    for share in CLIPS:
        found = within(share)
        error = found.error(rows, importance, axes)
        better = error < least
        best = _Rounded(
            np.where(better, found.numbers, best.numbers),
            np.where(better, found.scales, best.scales),
            np.where(better, found.zeros, best.zeros),
        )
        least = np.minimum(error, least)
    return best


def pack(numbers: NDArray[np.uint8], bits: int, *, signed: bool = False) -> NDArray[np.uint8]:
    """Numbers [R, n] side by side: 4 bits two to a byte, the even one in the low half, and a last one alone.

    With `signed`, as number − 2^(bits−1) in two's complement, which is the same with the highest bit turned.
    """
    if signed:
        numbers = numbers ^ np.uint8(1 << (bits - 1))
    if bits == 8:
        return np.ascontiguousarray(numbers)
    if numbers.shape[1] % 2:
        numbers = np.pad(numbers, ((0, 0), (0, 1)))
    return np.ascontiguousarray(numbers[:, ::2] | np.left_shift(numbers[:, 1::2], 4, dtype=np.uint8))


def _is_qdq(weight: Weight) -> bool:
    return weight.quantization is not None and weight.quantization.qdq
