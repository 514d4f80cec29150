"""Activation-aware rounding of weights: AWQ (arXiv 2306.00978), layer by layer, on a text that the user gives.

The inputs of a matrix differ in size from channel to channel, and an error in a column counts as much as its channel is
large. So columns of large channels are made larger before they are rounded, which makes their errors smaller, and what
makes the channel is made smaller by as much: a norm's weight, or the rows of the matrix before. The model in floats
stays the same, gates included, which read what the query projection reads. Then the range of each block is cut where
that makes the error less (quantization/rounding.py).

Each layer runs by itself (quantization/measured_layer.py) on all of the text, in pieces that know nothing of each
other, as a prompt does before anything leaves the cache. In memory are the weights of one layer in float32, and the
hidden states.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimkv_export.backends.onnxruntime import import_onnxruntime
from trimkv_export.checkpoint import TensorInfo
from trimkv_export.checkpoint.tensors import numpy_dtype
from trimkv_export.errors import CheckpointError
from trimkv_export.graph import LM_HEAD, gate_weight
from trimkv_export.models import DecoderSpec
from trimkv_export.quantization.measured_layer import measured_layer
from trimkv_export.quantization.rounding import Adjustment, rounding_error
from trimkv_export.quantization.wanted import Wanted

__all__ = ["calibrate"]

PIECE = 512  # tokens that go through a layer at once
EXPONENTS = [step / 20 for step in range(20)]
SAMPLED_ROWS = 512  # of a matrix, on which exponents are tried
# The least size of a channel, as a share of the mean, for on another text it may be larger; and where all are 0.
QUIET, SILENT = 0.01, 1e-12

Array = NDArray[np.float32]
# (tokens done, tokens in all)
Progress = Callable[[int, int], None]


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


def calibrate(
    spec: DecoderSpec, wanted: Mapping[str, Wanted], tokens: NDArray[np.int64], progress: Progress
) -> dict[str, Adjustment]:
    """What is to be done to the decoder's tensors, by name, before they are converted or rounded.

    Args:
        spec: the decoder.
        wanted: the tensors of the package, and where they come from.
        tokens: token ids of the text [n].
        progress: called with the tokens done and in all; each counts once for each layer.

    Raises:
        CheckpointError: the model's activations are not finite.
    """
    groups = [group for layer in range(spec.num_layers) for group in layer_groups(spec, layer)]
    # A tied head that is the embedding too is left as it is.
    if LM_HEAD in wanted and wanted[LM_HEAD].weight.quantization is not None:
        groups.append(Group([LM_HEAD], [(f"{spec.prefix}norm.weight", 0)]))
    rows: dict[str, Array] = {}
    columns: dict[str, Array] = {}
    importance: dict[str, Array] = {}
    for group, channels in zip(groups, _measure(spec, wanted, tokens, progress), strict=False):
        if not np.isfinite(channels.square).all():
            raise CheckpointError(
                f"{wanted[group.matrices[0]].source.file}: on this text the input of {group.matrices[0]} is not finite "
                "in float32; leave out --calibrate"
            )
        made, scales = _best_scales([wanted[name] for name in group.matrices], channels, group.shared)
        importance |= dict.fromkeys(group.matrices, channels.square / scales**2)
        if (scales == 1).all():
            continue
        columns |= dict.fromkeys([*group.matrices, *group.read_by], scales)
        for name, first in group.made_by:
            if name in wanted:
                factors = rows.setdefault(name, np.ones(wanted[name].weight.shape[0], np.float32))
                factors[first : first + len(made)] /= made
    return {
        name: Adjustment(rows.get(name), columns.get(name), importance.get(name))
        for name in rows.keys() | columns.keys() | importance.keys()
    }


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


def _measure(
    spec: DecoderSpec, wanted: Mapping[str, Wanted], tokens: NDArray[np.int64], progress: Progress
) -> Iterator[Channels]:
    """Run the model, and yield the inputs of each layer's groups, then that of the head."""
    graph, runtime = measured_layer(spec), import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    pieces = [tokens[start : start + PIECE] for start in range(0, len(tokens), PIECE)]
    hidden = [_rows(wanted[f"{spec.prefix}embed_tokens.weight"].source, piece) for piece in pieces]
    for layer in range(spec.num_layers):
        sources = {name: spec.layer(layer) + name.removeprefix(spec.layer(0)) for name in graph.weights}
        weights = {name: _floats(wanted[source].source.read()) for name, source in sources.items()}
        totals: list[NDArray[np.float64]] = [np.zeros(()) for _ in range(2 * len(graph.matrices))]
        for index, piece in enumerate(pieces):
            inputs = weights | _step_inputs(spec, piece) | {graph.hidden: hidden[index]}
            hidden[index], *sums = session.run(None, inputs)
            totals = [total + part for total, part in zip(totals, sums, strict=True)]
            progress(layer * len(tokens) + index * PIECE + len(piece), spec.num_layers * len(tokens))
        del weights, inputs
        for sizes, squares in zip(totals[::2], totals[1::2], strict=True):
            yield _channels(sizes, squares, len(tokens))
    norm = _floats(wanted[f"{spec.prefix}norm.weight"].source.read())
    sizes, squares = np.zeros(spec.hidden_size), np.zeros(spec.hidden_size)
    for part in hidden:
        normed = part / np.sqrt((part**2).mean(axis=1, keepdims=True) + spec.rms_norm_eps) * norm
        sizes += np.abs(normed).sum(axis=0)
        squares += (normed**2).sum(axis=0)
    yield _channels(sizes, squares, len(tokens))


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
