"""The vision tower, built node by node from the config. No weight is read here.

A call takes F frames of one grid of P patches: an image, or temporal patches of a video. Where patches lie in the grid
is told by inputs that the host computes from its height and width (`runtime/vision_grid.py`), so that the graph has no
arithmetic on shapes.
"""

import onnx
from onnx import TensorProto

from trimkv_export.config import Precision
from trimkv_export.graph.builder import OPSET, GraphBuilder
from trimkv_export.graph.functions.vision_attention import (
    ATTENTION_DOMAIN,
    VISION_ATTENTION,
    vision_attention_function,
)
from trimkv_export.graph.weights import IR_VERSION, TENSOR_TYPES, ModelGraph, Weight, external_initializer
from trimkv_export.models import VisionSpec

__all__ = ["build_vision"]


def build_vision(spec: VisionSpec, precision: Precision) -> ModelGraph:
    """Build the graph.

    Inputs: pixel_values [F, P, patch_dim] float32; position_index [4, P] int64 and position_weight [4, P] float32, the
    corners of the learned position grid and their shares; rotary_angle [P, D/2] float32.
    Outputs, in the package's precision: visual_embeds [F·P/m², d], deepstack_embeds [K, F·P/m², d].
    """
    builder = _VisionBuilder(spec, precision)
    return ModelGraph(builder.model(), tuple(builder.weights.values()))


class _VisionBuilder:
    def __init__(self, spec: VisionSpec, precision: Precision) -> None:
        self.spec, self.precision = spec, precision
        self.b = GraphBuilder()
        self.weights: dict[str, Weight] = {}
        self._shapes = spec.tensors()
        self._float = TENSOR_TYPES[precision.dtype]

    def weight(self, name: str, *shape: int) -> str:
        """Declare a weight; with a shape that differs from the checkpoint's, its bytes in that shape."""
        name = f"{self.spec.prefix}{name}"
        self.weights.setdefault(name, Weight(name, shape or self._shapes[name], self.precision.dtype))
        return name

    def linear(self, value: str, module: str) -> str:
        weight, bias = self.weight(f"{module}.weight"), self.weight(f"{module}.bias")
        return self.b.linear(value, weight, bias, name=f"{self.spec.prefix}{module}")

    def norm(self, value: str, module: str) -> str:
        return self.b.op(
            "LayerNormalization", value, self.weight(f"{module}.weight"), self.weight(f"{module}.bias"),
            name=f"{self.spec.prefix}{module}", axis=-1, epsilon=self.spec.layer_norm_eps,
        )  # fmt: skip

    def embed(self) -> str:
        """Patches and their positions -> [F·P, h]."""
        b, spec = self.b, self.spec
        pixels = b.cast(b.op("Reshape", "pixel_values", b.const([-1, spec.patch_dim])), self._float)
        weight = self.weight("patch_embed.proj.weight", spec.hidden_size, spec.patch_dim)
        bias = self.weight("patch_embed.proj.bias")
        patches = b.linear(pixels, weight, bias, name=f"{spec.prefix}patch_embed.proj")
        corners = b.cast(
            b.op("Gather", self.weight("pos_embed.weight"), "position_index", name=f"{spec.prefix}pos_embed"),
            TensorProto.FLOAT,
        )
        weighted = b.op("Mul", corners, b.unsqueeze("position_weight", 2))
        position = b.cast(b.op("ReduceSum", weighted, b.const([0]), keepdims=0), self._float)
        frames = b.op("Reshape", patches, self.by_frame)
        return b.op("Reshape", b.op("Add", frames, position), b.const([-1, spec.hidden_size]))

    def attention(self, hidden: str, block: str) -> str:
        """Attention within each frame, on [F·P, h]."""
        b, spec = self.b, self.spec
        parts = b.ops("Split", [self.linear(hidden, f"{block}.attn.qkv")], 3, axis=1, num_outputs=3)
        query, key, value = (b.op("Reshape", part, self.by_frame) for part in parts)
        query, key = (b.op("RotaryEmbedding", part, *self.rotary, num_heads=spec.num_heads) for part in (query, key))
        attended = b.op(
            VISION_ATTENTION, query, key, value,
            name=f"{spec.prefix}{block}.attn", domain=ATTENTION_DOMAIN,
            num_heads=spec.num_heads, scale=spec.head_dim**-0.5,
        )  # fmt: skip
        return self.linear(b.op("Reshape", attended, b.const([-1, spec.hidden_size])), f"{block}.attn.proj")

    def block(self, hidden: str, index: int) -> str:
        b, block = self.b, f"blocks.{index}"
        hidden = b.op("Add", hidden, self.attention(self.norm(hidden, f"{block}.norm1"), block))
        inner = self.linear(self.norm(hidden, f"{block}.norm2"), f"{block}.mlp.linear_fc1")
        return b.op("Add", hidden, self.linear(b.activation(inner, self.spec.hidden_act), f"{block}.mlp.linear_fc2"))

    def merge(self, hidden: str, module: str, *, norm_merged: bool) -> str:
        """Patches of a token side by side, then an MLP: [F·P, h] -> [F·P/m², d]."""
        b, merged = self.b, self.b.const([-1, self.spec.merged_size])
        if norm_merged:
            hidden = self.norm(b.op("Reshape", hidden, merged), f"{module}.norm")
        else:
            hidden = b.op("Reshape", self.norm(hidden, f"{module}.norm"), merged)
        return self.linear(b.op("Gelu", self.linear(hidden, f"{module}.linear_fc1")), f"{module}.linear_fc2")

    def model(self) -> onnx.ModelProto:
        b, spec = self.b, self.spec
        frames, patches = b.dim("pixel_values", 0), b.dim("pixel_values", 1)
        self.by_frame = b.shape_of(frames, patches, spec.hidden_size)
        angle = b.op("Expand", "rotary_angle", b.shape_of(frames, patches, spec.head_dim // 2))
        self.rotary = [b.cast(b.op(kind, angle), self._float) for kind in ("Cos", "Sin")]

        hidden, deepstack = self.embed(), []
        for index in range(spec.depth):
            hidden = self.block(hidden, index)
            if index in spec.deepstack_visual_indexes:
                module = f"deepstack_merger_list.{spec.deepstack_visual_indexes.index(index)}"
                deepstack.append(b.unsqueeze(self.merge(hidden, module, norm_merged=True), 0))
        embeds = self.merge(hidden, "merger", norm_merged=False)
        b.op("Identity", embeds, output="visual_embeds")
        if deepstack:
            b.op("Concat", *deepstack, axis=0, output="deepstack_embeds")

        info, width = onnx.helper.make_tensor_value_info, spec.out_hidden_size
        outputs = [info("visual_embeds", self._float, ["tokens", width])]
        if deepstack:
            outputs.append(info("deepstack_embeds", self._float, [len(deepstack), "tokens", width]))
        graph = onnx.helper.make_graph(
            b.nodes,
            "vision",
            [
                info("pixel_values", TensorProto.FLOAT, ["frames", "patches", spec.patch_dim]),
                info("position_index", TensorProto.INT64, [4, "patches"]),
                info("position_weight", TensorProto.FLOAT, [4, "patches"]),
                info("rotary_angle", TensorProto.FLOAT, ["patches", spec.head_dim // 2]),
            ],
            outputs,
            initializer=[
                external_initializer(part) for weight in self.weights.values() for part in weight.initializers
            ],
        )
        return onnx.helper.make_model(
            graph,
            functions=[vision_attention_function()],
            ir_version=IR_VERSION,
            opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(ATTENTION_DOMAIN, 1)],
            producer_name="trimkv-export",
        )
