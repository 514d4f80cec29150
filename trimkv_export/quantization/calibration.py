"""Rounding with regard to activations, layer by layer, on a text that the user gives, or on tokens drawn at random.

AWQ (arXiv 2306.00978): the inputs of a matrix differ in size from channel to channel, and an error in a column counts
as much as its channel is large. So columns of large channels are made larger before they are rounded, which makes their
errors smaller, and what makes the channel is made smaller by as much: a norm's weight, or the rows of the matrix
before. The model in floats stays the same, gates included, which read what the query projection reads. Scales of
blocks are of least squares with these sizes (quantization/rounding.py).

GPTQ (arXiv 2210.17323): after the same scales, columns are rounded one after the other, and those that follow take
back what an error does to the output (quantization/gptq.py). The numbers go to files as they will be stored.

Each layer runs by itself (quantization/measured_layer.py) on all of the text, in pieces that know nothing of each
other, as a prompt does before anything leaves the cache. In memory are the weights of one layer in float32, for GPTQ
the products of its inputs, and the hidden states.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimkv_export.backends.onnxruntime import import_onnxruntime
from trimkv_export.checkpoint import TensorInfo
from trimkv_export.checkpoint.tensors import numpy_dtype
from trimkv_export.config import Method
from trimkv_export.errors import CheckpointError
from trimkv_export.graph import LM_HEAD, gate_weight
from trimkv_export.models import DecoderSpec
from trimkv_export.quantization.gptq import SLAB, add_products, factorize, round_with_feedback
from trimkv_export.quantization.measured_layer import measured_layer
from trimkv_export.quantization.rounding import Adjustment, Rounding, rounding_error
from trimkv_export.quantization.wanted import Wanted

__all__ = ["Calibrated", "calibrate", "random_tokens"]

PIECE = 512  # tokens that go through a layer at once
EXPONENTS = [step / 10 for step in range(10)]
UNREAD = 256  # random tokens
SAMPLED_ROWS = 512  # of a matrix, on which exponents are tried
# The least size of a channel, as a share of the mean, for on another text it may be larger; and where all are 0.
QUIET, SILENT = 0.01, 1e-12

Array = NDArray[np.float32]
# (tokens done, tokens in all)
Progress = Callable[[int, int], None]


def random_tokens(spec: DecoderSpec) -> NDArray[np.int64]:
    """`UNREAD` tokens that stand for a text where there is none: from the whole vocabulary, always the same."""
    return np.random.default_rng(0).integers(0, spec.vocab_size, UNREAD)


@dataclass(frozen=True, eq=False)
class Channels:
    """Means of the absolute values of an input's channels, and of their squares, over all tokens: [K] each."""

    size: Array
    square: Array


@dataclass(frozen=True)
class Group:
    """Matrices with the same input, and where its scales can go.

    Attributes:
        matrices: their columns are multiplied.
        made_by: tensors whose rows make the channels and are divided, and the first of these rows; those that the model
            lacks are passed over.
        read_by: matrices in float that read the input too.
        shared: how many neighbouring heads of the input are made by the same rows, and their depth; (1, 1) where each
            channel has a row of its own.
    """

    matrices: Sequence[str]
    made_by: Sequence[tuple[str, int]]
    read_by: Sequence[str] = ()
    shared: tuple[int, int] = (1, 1)


def layer_groups(spec: DecoderSpec, layer: int) -> tuple[Group, ...]:
    """The groups of one layer, in the order in which it measures their inputs."""
    path = spec.layer(layer)
    attention, mlp = f"{path}.self_attn", f"{path}.mlp"
    depth, kv = spec.head_dim, spec.num_kv_heads * spec.head_dim
    first_value, first_up = spec.num_heads * depth + kv, spec.intermediate_size
    if spec.fused_projections:
        qkv, gate_up = [f"{attention}.qkv_proj"], [f"{mlp}.gate_up_proj"]
        value, up = (qkv[0], first_value), (gate_up[0], first_up)
    else:
        qkv, gate_up = [f"{attention}.{name}_proj" for name in "qkv"], [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        value, up = (qkv[2], 0), (gate_up[1], 0)

    def rows(module: str, first: int) -> Sequence[tuple[str, int]]:
        return [(f"{module}.{part}", first) for part in ("weight", "bias")]

    return (
        Group(
            [f"{module}.weight" for module in qkv],
            [(f"{path}.input_layernorm.weight", 0)],
            read_by=[gate_weight(spec, layer, "linear1.weight")],
        ),
        Group([f"{attention}.o_proj.weight"], rows(*value), shared=(spec.num_heads // spec.num_kv_heads, depth)),
        Group([f"{module}.weight" for module in gate_up], [(f"{path}.post_attention_layernorm.weight", 0)]),
        Group([f"{mlp}.down_proj.weight"], rows(*up)),
    )


@dataclass(frozen=True)
class Calibrated:
    """What calibration found.

    Attributes:
        adjustments: of tensors by name.
        int8: the matrices that are to be in int8 among others in int4, sorted; None where that was not asked for.
    """

    adjustments: Mapping[str, Adjustment]
    int8: Sequence[str] | None


def calibrate(
    spec: DecoderSpec,
    wanted: Mapping[str, Wanted],
    tokens: NDArray[np.int64],
    progress: Progress,
    *,
    method: Method | None = Method.AWQ,
    mixed: float | None = None,
    folder: Path | None = None,
) -> Calibrated:
    """What is to be done to the decoder's tensors before they are converted or rounded.

    Args:
        spec: the decoder.
        wanted: the tensors of the package, and where they come from.
        tokens: token ids of the text [n].
        progress: called with the tokens done and in all; each counts once for each layer.
        method: how matrices are rounded; None scales nothing, and only says how much each column counts.
        mixed: store those in int8 that int4 harms most, up to this many bits a weight; None has all in one format.
        folder: where GPTQ's numbers go; it exists.

    Raises:
        CheckpointError: the model's activations are not finite, or scales too large for their type.
    """
    found = _Found()
    harms: dict[str, float] = {}
    for layer in _measure(spec, wanted, tokens, progress, products=method is Method.GPTQ):
        for group, channels in zip(layer.groups, layer.channels, strict=True):
            if not np.isfinite(channels.square).all():
                if method is None:  # then all columns count the same
                    continue
                raise CheckpointError(
                    f"{wanted[group.matrices[0]].source.file}: on this text the input of {group.matrices[0]} is not "
                    "finite in float32; leave out --calibrate"
                )
            if method is None:
                found.importance |= dict.fromkeys(group.matrices, channels.square)
            else:
                _scale(found, group, wanted, channels)
        # Rows of a matrix may be scaled for the one after, so it is rounded once all is known of the layer.
        while layer.products:
            group, factor = layer.groups[-len(layer.products)], factorize(layer.products.pop(0), len(tokens))
            scales = found.columns.get(group.matrices[0])
            if scales is not None:
                factor /= scales[:, None]
            for name in group.matrices:
                found.parts[name] = _feedback(wanted[name], found.adjustment(name), factor, folder or Path())
            del factor
        if mixed is not None and layer.harm is not None:
            names = [name for group in layer.groups for name in group.matrices]
            harms |= {name: layer.harm(name, _as_rounded(wanted[name], found.adjustment(name))) for name in names}
    adjustments = {name: found.adjustment(name) for name in found.names()}
    int8 = None if mixed is None else _most_harmed(wanted, harms, mixed)
    for name in int8 or ():
        # In int8 the whole range is taken, and feedback gains nothing.
        adjustments[name] = replace(adjustments[name], parts=None)
    return Calibrated({name: each for name, each in adjustments.items() if each != Adjustment()}, int8)


class _Found:
    """What is known so far, by the names of tensors; see `Adjustment`."""

    def __init__(self) -> None:
        self.rows: dict[str, Array] = {}
        self.columns: dict[str, Array] = {}
        self.importance: dict[str, Array] = {}
        self.parts: dict[str, Mapping[str, Path]] = {}

    def names(self) -> set[str]:
        return self.rows.keys() | self.columns.keys() | self.importance.keys() | self.parts.keys()

    def adjustment(self, name: str) -> Adjustment:
        rows, columns, importance = (kind.get(name) for kind in (self.rows, self.columns, self.importance))
        return Adjustment(rows, columns, importance, self.parts.get(name))


def _scale(found: _Found, group: Group, wanted: Mapping[str, Wanted], channels: Channels) -> None:
    """AWQ of one group."""
    made, scales = _best_scales([wanted[name] for name in group.matrices], channels, group.shared)
    found.importance |= dict.fromkeys(group.matrices, channels.square / scales**2)
    if (scales == 1).all():
        return
    found.columns |= dict.fromkeys([*group.matrices, *group.read_by], scales)
    for name, first in group.made_by:
        if name in wanted:
            factors = found.rows.setdefault(name, np.ones(wanted[name].weight.shape[0], np.float32))
            factors[first : first + len(made)] /= made


def _feedback(one: Wanted, adjustment: Adjustment, factor: Array, folder: Path) -> Mapping[str, Path]:
    """GPTQ of one matrix, adjusted; the numbers are appended to its files slab by slab. `factor`: R of its inputs."""
    form = one.weight.quantization
    files: dict[str, Path] = {}
    if form is None:
        return files
    for start in range(0, one.source.shape[0], SLAB):
        rows = adjustment.apply(_rows(one.source, np.arange(start, min(start + SLAB, one.source.shape[0]))), start)
        parts = round_with_feedback(rows, factor, form, numpy_dtype(one.weight.dtype)).parts(form)
        one.check_scales(parts["scales"], rows)
        for kind, part in parts.items():
            files[kind] = folder / one.weight.part(kind)
            with files[kind].open("ab" if start else "wb") as file:
                file.write(part.view(np.uint8).data)
    return files


def _as_rounded(one: Wanted, adjustment: Adjustment) -> Array:
    """What takes a matrix's place when it is rounded, for inputs and outputs that are not scaled."""
    form, (count, columns) = one.weight.quantization, one.source.shape
    rows = _rows(one.source, np.arange(count))
    if form is None:
        return rows
    scales_type = numpy_dtype(one.weight.dtype)
    if adjustment.parts is not None:
        values = Rounding.read(adjustment.parts, form, (count, columns), scales_type).values()
    else:
        values = Rounding.of(adjustment.apply(rows, 0), form, scales_type, adjustment.importance).values()
    if adjustment.columns is not None:
        values /= adjustment.columns
    return values if adjustment.rows is None else values / adjustment.rows[:, None]


def _most_harmed(wanted: Mapping[str, Wanted], harms: Mapping[str, float], bits: float) -> list[str]:
    """Names of the matrices that become int8: those first that gain most for each byte, while they fit."""
    now = {name: wanted[name].weight for name in harms}
    more = {
        name: replace(weight, quantization=weight.quantization.of_bits(8)).nbytes - weight.nbytes
        for name, weight in now.items()
        if weight.quantization is not None
    }
    weights = sum(math.prod(weight.shape) for weight in now.values())
    left = math.floor(bits * weights / 8) - sum(weight.nbytes for weight in now.values())
    chosen = []
    for name in sorted(more, key=lambda name: (-harms[name] / more[name], name)):
        if more[name] <= left:
            left -= more[name]
            chosen.append(name)
    return sorted(chosen)


def _best_scales(matrices: Sequence[Wanted], channels: Channels, shared: tuple[int, int]) -> tuple[Array, Array]:
    """Scales of what makes the channels, and of the channels [K]: size**a, for the best a of `EXPONENTS` (AWQ, section
    3.2). With a = 0 all are 1, and rounding is as without calibration.
    """
    heads, depth = shared
    size = channels.size.reshape(-1, heads, depth).mean(axis=1)
    samples = [_rows(one.source, _sample(one.source.shape[0])) for one in matrices]
    best, least = (np.ones_like(size),) * 2, np.inf
    for exponent in EXPONENTS:
        made = size**exponent
        made /= np.sqrt(made.max() * made.min())
        scales = np.repeat(made[:, None], heads, axis=1).ravel()
        error = sum(
            rounding_error(sample * scales, form, numpy_dtype(one.weight.dtype), channels.square / scales**2)
            for one, sample in zip(matrices, samples, strict=True)
            if (form := one.weight.quantization) is not None
        )
        if error < least:
            best, least = (made.ravel(), scales), error
    return best


@dataclass
class _Layer:
    """What is measured of a layer, or of the head.

    Attributes:
        groups: its groups.
        channels: of the input of each.
        products: Σ x·xᵀ of each, [K, K]; none where that is not asked for.
        harm: of a matrix by name, and what takes its place: how far the layer's output is off, as the mean over tokens
            of |error|² / |output|²; None for the head.
    """

    groups: Sequence[Group]
    channels: Sequence[Channels]
    products: list[Array]
    harm: Callable[[str, Array], float] | None


def _measure(
    spec: DecoderSpec, wanted: Mapping[str, Wanted], tokens: NDArray[np.int64], progress: Progress, *, products: bool
) -> Iterator[_Layer]:
    """Run the model, and yield what is measured layer by layer; last of the head, where that is rounded by itself."""
    graph, runtime = measured_layer(spec), import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    pieces = [tokens[start : start + PIECE] for start in range(0, len(tokens), PIECE)]
    hidden = [_rows(wanted[f"{spec.prefix}embed_tokens.weight"].source, piece) for piece in pieces]

    def weights_of(layer: int) -> dict[str, Array]:
        sources = {name: spec.layer(layer) + name.removeprefix(spec.layer(0)) for name in graph.weights}
        return {name: _floats(wanted[source].source.read()) for name, source in sources.items()}

    for layer in range(spec.num_layers):
        groups, weights = layer_groups(spec, layer), weights_of(layer)
        sums = [_Sums(wanted[group.matrices[0]].weight.shape[1], products=products) for group in groups]
        before = hidden[len(pieces) // 2]
        for index, piece in enumerate(pieces):
            inputs = weights | _step_inputs(spec, piece) | {graph.hidden: hidden[index]}
            hidden[index], *read = session.run(None, inputs)
            for one, values in zip(sums, read, strict=True):
                one.add(values)
            progress(layer * len(tokens) + index * PIECE + len(piece), spec.num_layers * len(tokens))
        after = hidden[len(pieces) // 2]
        del weights, inputs, read

        def harm(name: str, values: Array, layer: int = layer, before: Array = before, after: Array = after) -> float:
            changed = weights_of(layer) | {spec.layer(0) + name.removeprefix(spec.layer(layer)): values}
            inputs = changed | _step_inputs(spec, pieces[len(pieces) // 2]) | {graph.hidden: before}
            off = session.run([graph.model.graph.output[0].name], inputs)[0] - after
            return float(((off**2).sum(axis=1) / np.maximum((after**2).sum(axis=1), SILENT)).mean())

        yield _Layer(
            groups, [one.channels() for one in sums], [one.products for one in sums if one.products is not None], harm
        )
        del sums
    # A tied head that is the embedding too is left as it is.
    if LM_HEAD in wanted and wanted[LM_HEAD].weight.quantization is not None:
        norm = _floats(wanted[f"{spec.prefix}norm.weight"].source.read())
        last = _Sums(spec.hidden_size)
        for part in hidden:
            last.add(part / np.sqrt((part**2).mean(axis=1, keepdims=True) + spec.rms_norm_eps) * norm)
        yield _Layer([Group([LM_HEAD], [(f"{spec.prefix}norm.weight", 0)])], [last.channels()], [], None)


class _Sums:
    """Over the tokens of a matrix's input."""

    def __init__(self, columns: int, *, products: bool = False) -> None:
        self.count = 0
        self.sizes, self.squares = np.zeros(columns), np.zeros(columns)
        self.products = np.zeros((columns, columns), np.float32) if products else None

    def add(self, inputs: Array) -> None:
        """Add inputs [tokens, K]."""
        self.count += len(inputs)
        with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at what is not finite
            self.sizes += np.abs(inputs).sum(axis=0)
            self.squares += (inputs**2).sum(axis=0)
            if self.products is not None:
                add_products(self.products, inputs)

    def channels(self) -> Channels:
        return _channels(self.sizes, self.squares, self.count)


def _channels(sizes: NDArray[np.float64], squares: NDArray[np.float64], count: int) -> Channels:
    """Of sums over `count` tokens."""

    def mean(total: NDArray[np.float64], power: int) -> Array:
        means = total / count
        return _floats(np.maximum(means, max(QUIET**power * means.mean(), SILENT**power)))

    return Channels(mean(sizes, 1), mean(squares, 2))


def _sample(rows: int) -> NDArray[np.int64]:
    """At most `SAMPLED_ROWS`, spread over all."""
    return np.arange(0, rows, -(-rows // SAMPLED_ROWS))


def _step_inputs(spec: DecoderSpec, tokens: NDArray[np.int64]) -> dict[str, NDArray[np.integer]]:
    """A step of a prompt's first tokens."""
    positions = np.arange(len(tokens))[None]
    return {
        "input_ids": tokens[None],
        "position_ids": np.tile(positions, (3, 1, 1)) if spec.rope.axes else positions,
        "step_tokens": np.array([len(tokens)], np.int32),
    }


def _rows(source: TensorInfo, rows: NDArray[np.int64]) -> Array:
    """Some rows of a matrix."""
    mapped = np.memmap(source.file, np.uint8, "r", source.offset, (source.shape[0], source.nbytes // source.shape[0]))
    return _floats(mapped[rows].view(numpy_dtype(source.dtype)))


def _floats(values: NDArray[np.generic]) -> Array:
    return values.astype(np.float32)
