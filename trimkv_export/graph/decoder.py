"""The decoder graph, built node by node from the config (docs/design.md, section 6). No weight is read here."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from trimkv_export.config import EvictionConfig, Precision, Quantization
from trimkv_export.errors import OptionError
from trimkv_export.graph.builder import OPSET, GraphBuilder
from trimkv_export.graph.functions import (
    GATE_FUNCTIONS,
    GATE_WEIGHTS,
    LOG_SIGMOID,
    MATMUL_BLOCKS,
    QUANTIZED_DOMAIN,
    QUANTIZED_EMBEDDING,
    QUANTIZED_LINEAR,
    log_sigmoid_function,
    pool_attention_function,
    pool_update_function,
    quantized_functions,
    retention_gate_function,
)
from trimkv_export.graph.ops import (
    DOMAIN,
    DOMAIN_VERSION,
    POOL_ATTENTION,
    POOL_ATTENTION_STATE,
    POOL_UPDATE,
    PoolAttentionAttributes,
    PoolUpdateAttributes,
)
from trimkv_export.graph.visual_inputs import VisualInputs
from trimkv_export.graph.weights import IR_VERSION, TENSOR_TYPES, ModelGraph, Weight, external_initializer
from trimkv_export.models import DecoderSpec
from trimkv_export.policy import STATE_TENSORS, CacheSpec

__all__ = ["LM_HEAD", "GateSpec", "build_decoder", "cache_spec", "gate_weight"]

# A head of its own; for DequantizeLinear also a tied one, which is quantised while the embedding is not.
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class GateSpec:
    """Kind and inner width of the retention gates."""

    kind: str
    intermediate_size: int


def cache_spec(spec: DecoderSpec, eviction: EvictionConfig, precision: Precision) -> CacheSpec:
    """The cache that a decoder needs under an eviction policy."""
    return CacheSpec(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        budget=eviction.budget,
        evict_every=eviction.evict_every,
        kv_dtype=precision.dtype,
    )


def gate_weight(spec: DecoderSpec, layer: int, weight: str) -> str:
    """Name of a gate tensor; `linear3` is one module for all layers and goes by its last layer's name."""
    owner = spec.num_layers - 1 if weight.startswith("linear3") else layer
    return f"{spec.layer(owner)}.self_attn.retention_gate.{weight}"


def build_decoder(
    spec: DecoderSpec,
    gate: GateSpec,
    eviction: EvictionConfig,
    precision: Precision,
    quantization: Quantization | None = None,
    wide: Collection[str] = (),
) -> ModelGraph:
    """Build the graph; its size depends on the number of layers, not on that of weights.

    Args:
        spec: the decoder.
        gate: its retention gates.
        eviction: the policy of its cache.
        precision: the element type of all that is not quantised.
        quantization: how linear layers are stored, gates left out; None leaves them in floats.
        wide: matrices that are stored in int8 though the others are in int4.

    Raises:
        OptionError: a layer does not divide into blocks.
    """
    builder = _DecoderBuilder(spec, gate, eviction, precision, quantization, wide)
    return ModelGraph(builder.model(), tuple(builder.weights.values()))


class _DecoderBuilder:
    def __init__(
        self,
        spec: DecoderSpec,
        gate: GateSpec,
        eviction: EvictionConfig,
        precision: Precision,
        quantization: Quantization | None,
        wide: Collection[str],
    ) -> None:
        self.spec, self.gate, self.eviction, self.precision = spec, gate, eviction, precision
        self.quantization = quantization
        self.wide = frozenset(wide)
        floats = set(quantization.floats) if quantization else set()
        self.floats = floats
        head = quantization.of_bits(quantization.head_bits) if quantization and quantization.head else None
        self.head = head if LM_HEAD not in floats else None
        self.embedding = None
        if head and not head.qdq:
            self.embedding = None if f"{spec.prefix}embed_tokens.weight" in floats else head
        self.cache = cache_spec(spec, eviction, precision)
        self.b = GraphBuilder()
        self.visual = VisualInputs(self.b, spec) if spec.takes_visual_inputs else None
        self.weights: dict[str, Weight] = {}
        self._shapes = spec.tensors() | self._gate_shapes()
        self._shapes.setdefault(LM_HEAD, self._shapes[spec.lm_head])

    def _gate_shapes(self) -> dict[str, tuple[int, ...]]:
        inner, heads = self.gate.intermediate_size, self.spec.num_kv_heads
        last = "linear3.weight" if self.gate.kind == "rg10" else "linear2.weight"
        shapes = {
            "linear1.weight": (inner, self.spec.hidden_size),
            "linear1.bias": (inner,),
            "linear2.weight": (inner, inner),
            "linear2.bias": (inner,),
            last: (heads, inner),
            "bias": (heads,),
        }
        return {
            gate_weight(self.spec, layer, weight): shapes[weight]
            for layer in range(self.spec.num_layers)
            for weight in GATE_WEIGHTS[self.gate.kind]
        }

    def weight(self, name: str, dtype: str | None = None) -> str:
        self.weights.setdefault(name, Weight(name, self._shapes[name], dtype or self.precision.dtype))
        return name

    def quantized(self, name: str, quantization: Quantization) -> Weight:
        """Declare a quantised weight."""
        shape, size = self._shapes[name], quantization.block_size
        if shape[1] % size:
            raise OptionError(
                f"{name} has {shape[1]} columns, which do not divide into blocks of {size}; take another --block-size, "
                "or --precision fp16"
            )
        return self.weights.setdefault(name, Weight(name, shape, self.scale_dtype(quantization), quantization))

    def format(self, weight: str, quantization: Quantization) -> Quantization:
        """How a linear layer's matrix is stored; `quantization` is that of most."""
        return quantization.of_bits(8) if weight in self.wide else quantization

    def scale_dtype(self, quantization: Quantization) -> str:
        return quantization.scale_dtype or self.precision.dtype

    def embed(self, tokens: str) -> str:
        """Rows of the embedding for tokens [n]."""
        module = f"{self.spec.prefix}embed_tokens"
        if self.embedding is None:
            return self.b.op("Gather", self.weight(f"{module}.weight"), tokens, name=module)
        found = self.quantized(f"{module}.weight", self.embedding)
        return self.b.op(QUANTIZED_EMBEDDING, tokens, *found.inputs, name=module, domain=DOMAIN)

    def norm(self, value: str, module: str) -> str:
        return self.b.op(
            "RMSNormalization", value, self.weight(f"{module}.weight"),
            name=module, axis=-1, epsilon=self.spec.rms_norm_eps, stash_type=1,
        )  # fmt: skip

    def linear(self, value: str, module: str) -> str:
        weight = f"{module}.weight"
        if self.quantization is not None and weight not in self.floats:
            form = self.format(weight, self.quantization)
            return self.with_bias(self.matmul(value, weight, form, module), module)
        bias = self.bias(module)
        return self.b.linear(value, self.weight(f"{module}.weight"), bias and self.weight(bias), name=module)

    def bias(self, module: str) -> str | None:
        return f"{module}.bias" if f"{module}.bias" in self._shapes else None

    def with_bias(self, value: str, module: str) -> str:
        bias = self.bias(module)
        return self.b.op("Add", value, self.weight(bias)) if bias else value

    def matmul(self, value: str, weight: str, quantization: Quantization, module: str) -> str:
        """x·Wᵀ for a quantised W."""
        if not quantization.qdq:
            return self.matmuls(value, [weight], quantization, module)[0]
        numbers, scales = self.quantized(weight, quantization).inputs
        blocks: dict[str, Any] = (
            {"axis": 0} if quantization.per_row else {"axis": 1, "block_size": quantization.block_size}
        )
        matrix = self.b.op("DequantizeLinear", numbers, scales, name=f"{module}.dequantize", **blocks)
        return self.b.linear(value, matrix, name=module)

    def matmuls(self, value: str, weights: Sequence[str], quantization: Quantization, module: str) -> list[str]:
        """x·Wᵀ for up to three W, quantised in blocks."""
        found = [self.quantized(weight, quantization) for weight in weights]
        rows = {f"N_{number}": weight.shape[0] for number, weight in enumerate(found)}
        return self.b.ops(
            QUANTIZED_LINEAR[len(found) - 1], [value, *(part for weight in found for part in weight.inputs)],
            len(found), name=module, domain=DOMAIN,
            K=found[0].shape[1], bits=quantization.bits, block_size=quantization.block_size, **rows,
        )  # fmt: skip

    def projections(self, hidden: str, module: str, fused: str, parts: Mapping[str, int]) -> Iterator[str]:
        """Projections of one input, by the names and rows in `parts`: from one matrix that holds them all, one after
        the other, or from a matrix each. Those are made together if they are quantised in blocks, else when they are
        asked for, so that few live at a time.
        """
        if self.spec.fused_projections:
            whole = self.linear(hidden, f"{module}.{fused}")
            return iter(self.b.ops("Split", [whole, self.b.const(list(parts.values()))], len(parts), axis=1))
        modules = [f"{module}.{name}" for name in parts]
        weights = [f"{each}.weight" for each in modules]
        if self.quantization is None or self.quantization.qdq or self.floats & set(weights):
            return (self.linear(hidden, each) for each in modules)
        products: dict[str, str] = {}
        for wide in (False, True):
            names = [weight for weight in weights if (weight in self.wide) is wide]
            if names:
                name = f"{module}.{fused}" if len(names) > 1 else names[0].removesuffix(".weight")
                form = self.format(names[0], self.quantization)
                products |= zip(names, self.matmuls(hidden, names, form, name), strict=True)
        return map(self.with_bias, (products[weight] for weight in weights), modules)

    def rotate(self, value: str, cos: str, sin: str, heads: int, module: str) -> str:
        """RoPE on [B, S, heads, D], which keeps its shape."""
        flat = self.b.op("Reshape", value, self.b.const([0, 0, heads * self.spec.head_dim]))
        attributes: dict[str, Any] = {"num_heads": heads}
        if self.spec.rope.rotary_dim < self.spec.head_dim:
            attributes["rotary_embedding_dim"] = self.spec.rope.rotary_dim
        turned = self.b.op("RotaryEmbedding", flat, cos, sin, name=f"{module}.rotary", **attributes)
        return self.b.op("Reshape", turned, self.b.const([0, 0, heads, self.spec.head_dim]))

    def rotary_tables(self) -> tuple[str, str]:
        """Cosines and sines [B, S, R], from position_ids."""
        b, rope = self.b, self.spec.rope
        position = b.cast("position_ids", TensorProto.FLOAT)
        if rope.axes is not None:  # [3, B, S]: each frequency takes the position of its axis
            by_token = b.op("Transpose", position, perm=[1, 2, 0])
            position = b.op("Gather", by_token, b.const(rope.axes), axis=2)
        else:
            position = b.unsqueeze(position, 2)
        angle = b.op("Mul", position, b.const(rope.inverse_frequencies, np.float32))

        def table(kind: str) -> str:
            values = b.op(kind, angle)
            if rope.attention_scaling != 1:
                values = b.op("Mul", values, b.const(rope.attention_scaling, np.float32))
            return b.cast(values, TENSOR_TYPES[self.precision.dtype])

        return table("Cos"), table("Sin")

    def attention(self, hidden: str, layer: int, rope: tuple[str, str], batch_steps: str) -> tuple[str, ...]:
        """Attention block on [B·S, d] -> its output, and the step's key, value, z of the gate and attended."""
        b, spec = self.b, self.spec
        module = f"{spec.layer(layer)}.self_attn"

        projected = self.projections(hidden, module, "qkv_proj", spec.attention_projections)

        def heads(flat: str, count: int, name: str) -> str:
            value = b.reshape(flat, b.shape_of(batch_steps, count, spec.head_dim))
            if name == "v":
                return value
            normed = self.norm(value, f"{module}.{name}_norm") if spec.qk_norm else value
            return self.rotate(normed, *rope, count, f"{module}.{name}_proj")

        counts = spec.num_heads, spec.num_kv_heads, spec.num_kv_heads
        query, key, value = (heads(*parts) for parts in zip(projected, counts, "qkv", strict=True))
        gate_inputs = [
            self.weight(gate_weight(spec, layer, weight), "float32" if weight == "bias" else None)
            for weight in GATE_WEIGHTS[self.gate.kind]
        ]
        z = b.op(GATE_FUNCTIONS[self.gate.kind], hidden, *gate_inputs, name=f"{module}.retention_gate", domain=DOMAIN)
        attributes = PoolAttentionAttributes(layer, spec.num_layers, spec.num_kv_heads, spec.head_dim**-0.5)
        attended = b.op(
            POOL_ATTENTION,
            query, key, value, *(f"past.{name}" for name in POOL_ATTENTION_STATE), "step_tokens",
            name=f"{module}.pool_attention", domain=DOMAIN, **attributes.as_dict(),
        )  # fmt: skip
        flat = b.op("Reshape", attended, b.const([-1, spec.num_heads * spec.head_dim]))
        return self.linear(flat, f"{module}.o_proj"), key, value, z, attended

    def log_betas(self, z: Sequence[str], batch_steps: str) -> list[str]:
        """Log-retention [B, S, H] of each layer, from its gate's z [B·S, H]."""
        b, heads, layers = self.b, self.spec.num_kv_heads, len(z)
        together = b.reshape(b.op("Concat", *z, axis=1), b.shape_of(batch_steps, layers * heads))
        log_beta = b.op(LOG_SIGMOID, together, name="log_beta", domain=DOMAIN)
        return b.ops("Split", [log_beta, b.const([heads] * layers)], layers, name="log_betas", axis=2)

    def mlp(self, hidden: str, layer: int) -> str:
        module = f"{self.spec.layer(layer)}.mlp"
        parts = self.projections(hidden, module, "gate_up_proj", self.spec.mlp_projections)
        gate = self.b.activation(next(parts), self.spec.hidden_act)
        gated = self.b.op("Mul", gate, next(parts))
        return self.linear(gated, f"{module}.down_proj")

    def model(self) -> onnx.ModelProto:
        b, spec = self.b, self.spec
        float_type = TENSOR_TYPES[self.precision.dtype]
        batch_steps = b.op("Shape", "input_ids")
        rope = self.rotary_tables()

        hidden = self.embed(b.op("Reshape", "input_ids", b.const([-1])))
        if self.visual:
            hidden = self.visual.replace(hidden)
        new: dict[str, list[str]] = {"key": [], "value": [], "z": []}
        attended = ""
        for layer in range(spec.num_layers):
            path = spec.layer(layer)
            out, key, value, z, attended = self.attention(
                self.norm(hidden, f"{path}.input_layernorm"), layer, rope, batch_steps
            )
            hidden = b.op("Add", hidden, out)
            hidden = b.op("Add", hidden, self.mlp(self.norm(hidden, f"{path}.post_attention_layernorm"), layer))
            if self.visual:
                hidden = self.visual.add_deepstack(hidden, layer)
            for kind, output in zip(new, (key, value, z), strict=True):
                new[kind].append(output)

        # Only each row's last valid token goes through the head. Range takes numbers on the host and writes to the
        # device; arithmetic there with a dimension would copy it to the GPU in each step, and a CUDA graph has no such
        # copies.
        steps = b.dim("input_ids", 1)
        row = b.arange(b.op("Mul", b.dim("input_ids", 0), steps), step=steps)
        last = b.op("Add", row, b.op("Sub", b.cast("step_tokens", TensorProto.INT64), b.const([1])))
        final = self.norm(b.op("Gather", hidden, last), f"{spec.prefix}norm")
        if self.head is None:
            logits = b.linear(final, self.weight(spec.lm_head), name="lm_head")
        else:
            head = LM_HEAD if self.head.qdq else spec.lm_head
            logits = self.matmul(final, head, self.head, "lm_head")
        b.op("Cast", logits, to=TensorProto.FLOAT, output="logits")

        attributes = PoolUpdateAttributes(spec.num_layers, spec.num_kv_heads, self.eviction)
        b.ops(
            POOL_UPDATE,
            [*(f"past.{name}" for name in STATE_TENSORS), "step_tokens", "budget", attended,
             *new["key"], *new["value"], *self.log_betas(new["z"], batch_steps)],
            [f"present.{name}" for name in STATE_TENSORS],
            name="pool_update", domain=DOMAIN, **attributes.as_dict(),
        )  # fmt: skip

        info = onnx.helper.make_tensor_value_info
        state: list[tuple[str, int, list[str | int | None]]] = [
            (t.name, TENSOR_TYPES[t.dtype], ["batch", *t.shape[1:]]) for t in self.cache.tensors()
        ]
        graph = onnx.helper.make_graph(
            b.nodes,
            "decoder",
            [
                info("input_ids", TensorProto.INT64, ["batch", "step"]),
                info("position_ids", TensorProto.INT64, [*([3] if spec.rope.axes else []), "batch", "step"]),
                info("step_tokens", TensorProto.INT32, ["batch"]),
                info("budget", TensorProto.INT32, ["batch"]),
                *(self.visual.inputs(float_type) if self.visual else []),
                *(info(f"past.{name}", dtype, shape) for name, dtype, shape in state),
            ],
            [
                info("logits", TensorProto.FLOAT, ["batch", spec.vocab_size]),
                *(info(f"present.{name}", dtype, shape) for name, dtype, shape in state),
            ],
            initializer=[
                external_initializer(part) for weight in self.weights.values() for part in weight.initializers
            ],
        )
        functions = [
            retention_gate_function(self.gate.kind, spec.hidden_act),
            log_sigmoid_function(),
            pool_attention_function(),
            pool_update_function(attributes),
        ]
        domains = {"": OPSET, DOMAIN: DOMAIN_VERSION}
        if self.quantization is not None and not self.quantization.qdq:
            used = {node.op_type for node in b.nodes} | {MATMUL_BLOCKS}  # which is in the others' bodies
            scales = TENSOR_TYPES[self.scale_dtype(self.quantization)]
            forms = self.quantization, self.head or self.quantization
            mixed = bool(self.wide) or forms[0].bits != forms[1].bits
            bodies = quantized_functions(*forms, float_type, scales, mixed=mixed)
            functions += [function for function in bodies if function.name in used]
            domains[QUANTIZED_DOMAIN] = 1
        return onnx.helper.make_model(
            graph,
            functions=functions,
            ir_version=IR_VERSION,
            opset_imports=[onnx.helper.make_opsetid(domain, version) for domain, version in domains.items()],
            producer_name="trimkv-export",
        )
