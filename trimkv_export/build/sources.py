"""Which tensors of a checkpoint become which weights of a package, and whether all of them are there and sound."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from trimkv_export.checkpoint import Backbone, Gates, StoredQuantization, TensorInfo, check_tensors
from trimkv_export.checkpoint.tensors import same_values
from trimkv_export.errors import CheckpointError
from trimkv_export.graph import LM_HEAD, ModelGraph, Weight, gate_weight
from trimkv_export.models import DecoderSpec, VisionSpec, tensor_names
from trimkv_export.quantization.imported import is_stored, linear_weights
from trimkv_export.quantization.rounding import TakenPart
from trimkv_export.quantization.wanted import Wanted
from trimkv_export.words import shorten

__all__ = ["check_backbone", "named_backbone", "wanted_weights"]

GATE = ".self_attn.retention_gate."
BUFFERS = ".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"


def named_backbone(backbone: Backbone, where: Path) -> Backbone:
    """The backbone with its tensors by the names of the family, without gates that lie among them.

    Raises:
        CheckpointError: two names mean the same tensor.
        UnsupportedModelError: a family that this version does not have.
    """
    names = tensor_names(backbone.config, where, backbone.tensors)
    return replace(
        backbone, tensors={ours: backbone.tensors[stored] for ours, stored in names.items() if GATE not in ours}
    )


def check_backbone(
    backbone: Backbone, spec: DecoderSpec, vision: VisionSpec | None, stored: StoredQuantization | None
) -> None:
    """Check that the checkpoint has exactly the tensors that the model needs; small ones are read.

    Raises:
        CheckpointError: it lacks one, has another one, or one of another shape or type; a bias that the family does not
            have and that is not zero; a head that is tied to the embedding, and differs from it.
        UnsupportedModelError: columns of quantised matrices in another order than their groups.
    """
    found, where = backbone.tensors, backbone.path
    expected = spec.tensors() | (vision.tensors() if vision else {})
    linear, packed, spare = linear_weights(spec), dict[str, tuple[int, ...]](), set[str]()
    if stored is not None:
        for name, shape in linear.items():
            if is_stored(stored, name, found):
                del expected[name]
                for part, (source, stored_shape) in stored.tensors(name, shape).items():
                    (expected if part == "scales" else packed)[source] = stored_shape
                if (order := stored.order(name)) and (order in found or not stored.ordered):
                    packed[order] = (shape[1],)
    # Old exports carry RoPE buffers, some exporters biases of zeros, and some a copy of a tied head.
    ends = *BUFFERS, *(stored.beside if stored else ())
    for name in linear:
        bias = f"{name.removesuffix('weight')}bias"
        if bias in found and bias not in expected:
            _check_spare_bias(found[bias], where)
            spare.add(bias)
    if spec.tie_word_embeddings and LM_HEAD in found:
        _check_tied(found[LM_HEAD], found.get(spec.lm_head), where)
        spare.add(LM_HEAD)
    unused = tuple(vision.unused) if vision else ()
    check_tensors(
        found,
        expected,
        where=where,
        packed=packed,
        ignore=lambda name: name in spare or name.endswith(ends) or name.startswith(unused),
    )
    for name in packed:
        if stored is not None and name.endswith(".g_idx"):
            stored.check_order(found[name].read(), f"{found[name].file}: {shorten(found[name].name, 200)}")


def _check_spare_bias(bias: TensorInfo, where: Path) -> None:
    """A bias of zeros says nothing, and some exporters write one for each matrix."""
    if len(bias.shape) == 1 and bias.dtype in ("float16", "bfloat16", "float32"):
        values = bias.read().astype(np.float32)
        if not values.any():
            return
        fault = f"holds {int(np.count_nonzero(values))} values that are not 0"
    else:
        fault = f"is {bias.dtype} of shape {list(bias.shape)}"
    raise CheckpointError(
        f"{where}: {shorten(bias.name, 200)} {fault}, and this model has no such bias: config.json and the weights do "
        "not belong together (attention_bias, mlp_bias), or the family is another"
    )


def _check_tied(head: TensorInfo, embedding: TensorInfo | None, where: Path) -> None:
    if embedding is not None and not same_values(head, embedding):
        raise CheckpointError(
            f"{where}: tie_word_embeddings is true, and {shorten(head.name, 200)} differs from "
            f"{shorten(embedding.name, 200)}: transformers 4 takes the embedding and transformers 5 the head; set "
            "tie_word_embeddings to false if the head is meant, else remove it"
        )


def wanted_weights(
    graphs: Mapping[str, ModelGraph],
    spec: DecoderSpec,
    backbone: Backbone,
    gates: Gates,
    stored: StoredQuantization | None,
) -> dict[str, Wanted]:
    """Where every weight of the graphs comes from, by name; those that are quantised already, by the names of parts."""
    tensors = dict(backbone.tensors)
    for layer, parts in enumerate(gates.layers):
        tensors |= {gate_weight(spec, layer, part): info for part, info in parts.items()}
    linear = {} if stored is None else linear_weights(spec)
    out: dict[str, Wanted] = {}
    for file, graph in graphs.items():
        for weight in graph.weights:
            data = f"{file}.data"
            if stored is not None and weight.name in linear and is_stored(stored, weight.name, backbone.tensors):
                out |= {
                    name: Wanted(source, weight, data, part) for name, source, part in _taken(weight, stored, tensors)
                }
            else:
                # A tied head may be stored next to the embedding, of which it is a copy.
                source = tensors[spec.lm_head if weight.name == LM_HEAD else weight.name]
                out[weight.name] = Wanted(source, weight, data)
    return out


def _taken(
    weight: Weight, stored: StoredQuantization, tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, TensorInfo, TakenPart]]:
    """The parts of a weight that is quantised already: name in the package, source, and what becomes of it."""
    sources = {part: tensors[name] for part, (name, _) in stored.tensors(weight.name, weight.shape).items()}
    if weight.quantization is None:
        whole = TakenPart("weight", stored, sources["scales"], sources.get("qzeros"))
        yield weight.name, sources["qweight"], whole
        return
    for part, source in sources.items():
        yield weight.part(part), source, TakenPart(part, stored)
