"""Quantised weights in the package's formats (graph/functions/quantized.py): rounded here, or taken as they are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimkv_export.checkpoint import StoredQuantization, TensorInfo
from trimkv_export.checkpoint.tensors import numpy_dtype
from trimkv_export.config import BuildOptions, HeadWeights, PlanOptions, Quantization
from trimkv_export.errors import CheckpointError, OptionError
from trimkv_export.graph import Weight
from trimkv_export.models import DecoderSpec

__all__ = [
    "Adjustment",
    "Rounding",
    "TakenPart",
    "block_scales",
    "chosen_quantization",
    "pack",
    "quantize",
    "rounded",
    "rounding_error",
    "unpack",
]

Rows = NDArray[np.float32]
ROW_BLOCK = 128  # columns of a block where a whole row has one scale
SMALL_WIDTH = 2048  # hidden_size of models whose head is int8 though it is no embedding
TENSORRT_BLOCKS = (64, 128)  # of int4, what its kernels are for
# Of a block's range, with which scales start. Finer ones took 2% off the squared error, in three times the time.
SHARES = (1, 1.06, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64)
TINY = np.float32(1e-30)
CACHED = 1 << 16  # elements that are rounded at once


def chosen_quantization(
    options: BuildOptions | PlanOptions, stored: StoredQuantization | None, where: Path, spec: DecoderSpec
) -> Quantization | None:
    """How linear layers are stored in the package: as the options say, or as the checkpoint (`where`) is already.

    Where the options leave the head open, it is int8: a head that is the embedding too costs as much in int4 as all
    layers may. In a large model whose head is a matrix of its own, it is stored like the layers.

    Raises:
        OptionError: the options want such a checkpoint in another precision, or the target cannot run it.
    """
    found = options.quantization if stored is None else _taken_quantization(options, stored, where)
    if found is not None and found.head:
        small = spec.tie_word_embeddings or spec.hidden_size <= SMALL_WIDTH
        head = options.head or (HeadWeights.INT8 if small else HeadWeights(f"int{found.bits}"))
        bits = int(head.removeprefix("int"))
        found = replace(found, head_bits=None if bits == found.bits else bits)
    if options.mixed is not None and found is not None:
        if stored is not None:
            raise OptionError(
                f"mixed {options.mixed:g}: {where} is of a checkpoint that is quantised already ({stored.method}), and "
                "taken as it is; leave out --mixed, or take the original"
            )
        item = numpy_dtype(found.scale_dtype or options.compute.dtype).itemsize
        least = found.bits + (8 * item + (0 if found.symmetric else found.bits)) / found.block_size
        if options.mixed < least:
            raise OptionError(
                f"mixed {options.mixed:g}: int4 in blocks of {found.block_size} takes {least:g} bits a weight by "
                "itself; give more, or larger blocks"
            )
    if found is None or not options.target.decodes_in_tensorrt:
        return found
    if found.symmetric and (found.per_row if found.bits == 8 else found.block_size in TENSORRT_BLOCKS):
        if found.head_bits == 4 and found.block_size not in TENSORRT_BLOCKS:
            raise OptionError(
                f"{options.model}: an int4 head in blocks of {found.block_size} does not run on TensorRT, which takes "
                "blocks of 64 or 128; build with --head int8, or --block-size 128"
            )
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
    head = options.head not in (None, HeadWeights.FLOAT)
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
        parts: of a matrix that calibration has rounded itself, files with the bytes of qweight, scales and qzeros.
    """

    rows: Rows | None = None
    columns: Rows | None = None
    importance: Rows | None = None
    parts: Mapping[str, Path] | None = None

    def apply(self, values: Rows, start: int) -> Rows:
        """Rows [R, K] of the tensor, the first of which is row `start`, scaled."""
        if self.rows is not None:
            values = values * self.rows[start : start + len(values), None]
        return values if self.columns is None else values * self.columns


def quantize(
    rows: Rows, quantization: Quantization, scale_dtype: np.dtype, importance: Rows | None = None
) -> dict[str, NDArray[np.generic]]:
    """Rows [R, K] -> qweight [R, K·bits/8] and qzeros [R, ⌈blocks·bits/8⌉] uint8, scales [R, blocks].

    Scales, and zero points, are those of `Rounding`; with `per_row` the whole row is one block, and its scale is
    repeated. With `qdq` numbers are signed, scales of rows come once, [R, 1], and all are above 0: TensorRT wants
    positive ones.

    Args:
        rows: whole rows of the matrix.
        quantization: the format.
        scale_dtype: of the scales.
        importance: [K], weights of the columns' squared errors; None counts all the same.
    """
    return Rounding.of(rows, quantization, scale_dtype, importance).parts(quantization)


def rounding_error(rows: Rows, quantization: Quantization, scale_dtype: np.dtype, importance: Rows) -> float:
    """Σ importance · (rounded − row)² over all of rows [R, K]; importance [K]."""
    found = Rounding.of(rows, quantization, scale_dtype, importance)
    return float((((found.values() - rows) ** 2) @ importance).sum())


@dataclass(frozen=True, eq=False)
class Rounding:
    """Rows in whole numbers without sign: value = (number − zero) · scale.

    Attributes:
        numbers: [R, K] uint8.
        scales: [R, blocks] as they are stored; of whole rows [R, 1].
        zeros: of the same shape, uint8.
    """

    numbers: NDArray[np.uint8]
    scales: NDArray[np.generic]
    zeros: NDArray[np.uint8]

    @classmethod
    def of(
        cls, rows: Rows, quantization: Quantization, scale_dtype: np.dtype, importance: Rows | None = None
    ) -> "Rounding":
        """Round rows [R, K] so that Σ importance · (value − row)² is small in each block.

        A block's scale starts as that of its range times one of `SHARES`, and becomes the one of least squares for the
        numbers which that start gives: Σ i·w·n / Σ i·n², n without the zero point. The share with the least error is
        taken. In a symmetric block −2^(bits−1) is the value of largest size, so the scale has its opposite sign; for
        TensorRT, the scale is above 0, and the range is the least that holds all. Else zero points from the middle of
        the range, and one to either side, are tried with each share. int8 takes the whole range: nothing else gains.
        Then numbers are rounded with the scale as it is stored. Rows are taken a few at a time, for the cache.
        """
        size = rows.shape[1] if quantization.per_row else quantization.block_size
        few = max(1, CACHED // rows.shape[1])
        weights = None
        if importance is not None:
            weights = np.tile(importance.reshape(-1, size).T.astype(np.float32), (1, min(few, len(rows))))
        numbers = np.empty(rows.shape, np.uint8)
        shape = len(rows), rows.shape[1] // size
        scales, zeros = np.empty(shape, scale_dtype), np.empty(shape, np.uint8)
        for start in range(0, len(rows), few):
            part = rows[start : start + few]
            blocks = np.ascontiguousarray(part.reshape(-1, size).T)
            here = None if weights is None else weights[:, : blocks.shape[1]]
            scale, zero = block_scales(blocks, quantization, scale_dtype, here)
            found = rounded(blocks, scale, zero, quantization.bits)
            numbers[start : start + few] = found.T.reshape(part.shape)
            scales[start : start + few] = scale.reshape(len(part), -1)
            zeros[start : start + few] = zero.reshape(len(part), -1)
        return cls(numbers, scales, zeros)

    @classmethod
    def read(
        cls, parts: Mapping[str, Path], quantization: Quantization, shape: tuple[int, int], scale_dtype: np.dtype
    ) -> "Rounding":
        """What `parts` of a matrix of this shape were written to files."""
        bits, signed = quantization.bits, quantization.qdq

        def of(kind: str) -> NDArray[np.uint8]:
            return np.fromfile(parts[kind], np.uint8).reshape(shape[0], -1)

        scales = of("scales").view(scale_dtype)
        zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        if not quantization.symmetric:
            zeros = unpack(of("qzeros"), bits)[:, : scales.shape[1]]
        return cls(unpack(of("qweight"), bits, signed=signed), scales, zeros)

    def values(self) -> Rows:
        """What the numbers stand for [R, K]."""
        blocks = self.numbers.reshape(*self.scales.shape, -1)
        scales = self.scales[..., None].astype(np.float32)
        found: Rows = (blocks - self.zeros[..., None].astype(np.float32)) * scales
        return found.reshape(self.numbers.shape)

    def parts(self, quantization: Quantization) -> dict[str, NDArray[np.generic]]:
        """As they are stored: qweight, scales and, if asymmetric, qzeros."""
        rows, columns = self.numbers.shape
        blocks = columns // quantization.block_size
        shape = rows, 1 if quantization.qdq and quantization.per_row else blocks
        found: dict[str, NDArray[np.generic]] = {
            "qweight": pack(self.numbers, quantization.bits, signed=quantization.qdq),
            "scales": np.ascontiguousarray(np.broadcast_to(self.scales, shape)),
        }
        if not quantization.symmetric:
            found["qzeros"] = pack(np.broadcast_to(self.zeros, shape), quantization.bits)
        return found


def rounded(blocks: Rows, scales: NDArray[np.generic], zeros: Rows, bits: int) -> NDArray[np.uint8]:
    """Numbers without sign of blocks [size, n], with a scale and a zero point each [n]."""
    step = scales.astype(np.float32)
    step[step == 0] = 1  # a scale too small for its type
    found: Rows = blocks / step
    np.rint(found, out=found)
    found += zeros
    np.clip(found, 0, (1 << bits) - 1, out=found)
    return found.astype(np.uint8)


def block_scales(
    blocks: Rows, quantization: Quantization, scale_dtype: np.dtype, importance: Rows | None = None
) -> tuple[NDArray[np.generic], Rows]:
    """Scales, as they are stored, and zero points [n] of blocks [size, n]; see `Rounding.of`. importance: as blocks."""
    top, half = np.float32((1 << quantization.bits) - 1), np.float32(1 << (quantization.bits - 1))
    high, low = np.maximum(blocks.max(axis=0), 0), np.minimum(blocks.min(axis=0), 0)
    signed = quantization.symmetric and not quantization.qdq
    if signed:
        whole = np.where(high > -low, high, low) / -half
    elif quantization.symmetric:
        whole = np.maximum(high / (half - 1), low / -half)
    else:
        whole = (high - low) / top
    whole[np.abs(whole) < TINY] = 1  # a block of zeros
    weighted = blocks if importance is None else blocks * importance
    most, scales = np.full(len(whole), -1, np.float32), whole
    zeros = np.full_like(whole, half) if quantization.symmetric else np.clip(np.rint(-low / whole), 0, top)
    numbers, product = np.empty_like(blocks), np.empty_like(blocks)
    for share in SHARES if quantization.bits == 4 else (1,):
        inverse = 1 / (whole * np.float32(share))
        nearest = np.rint(blocks * inverse)
        middle = half if quantization.symmetric else np.rint((top - (high + low) * inverse) / 2)
        for shift in (0,) if quantization.symmetric else (0, -1, 1):
            zero = np.clip(middle + np.float32(shift), 0, top)
            np.maximum(nearest, -zero, out=numbers)
            np.minimum(numbers, top - zero, out=numbers)
            along = np.multiply(numbers, weighted, out=product).sum(axis=0)
            np.multiply(numbers, numbers, out=product)
            if importance is not None:
                np.multiply(product, importance, out=product)
            square = product.sum(axis=0)
            square[square == 0] = 1
            fitted = along / square
            gain = along * fitted  # Σ i·w² less the error that is left
            if not signed:
                gain[fitted <= 0] = -1
            better = gain > most
            most, scales = np.where(better, gain, most), np.where(better, fitted, scales)
            zeros = np.where(better, zero, zeros)
    scales = np.where(scales == 0, whole, scales)
    with np.errstate(over="ignore"):  # the caller looks at scales that are not finite
        stored = scales.astype(scale_dtype)
    if not quantization.symmetric or quantization.qdq:
        stored = np.where(stored == 0, np.ones_like(stored), stored)
    return stored, zeros


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


def unpack(packed: NDArray[np.uint8], bits: int, *, signed: bool = False) -> NDArray[np.uint8]:
    """What `pack` made of numbers; a last one that is alone has a 0 after it."""
    numbers = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return numbers ^ np.uint8(1 << (bits - 1)) if signed else numbers


def _is_qdq(weight: Weight) -> bool:
    return weight.quantization is not None and weight.quantization.qdq
