"""The vision tower, built node by node from the config. No weight is read here.

A call takes F frames of one grid of P patches: an image, or temporal patches of a video. Where patches lie in the grid
is told by inputs that the host computes from its height and width (`vision/grid.py`), so that the graph has no
arithmetic on shapes.
"""

from typing import Any

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

    Inputs: pixel_values [F, P, patch_dim] float32. Where images differ in size, also, as far as the tower has them:
    position_index [4, P] int64 and position_weight [4, P] float32, the corners of the learned position grid and their
    shares; rotary_angle [P, D/2] float32; window_patch [W, S] int64, window_mask [W, S, S] bool and window_place [P]
    int64: the patches in W windows of S places, which places (the last axis) have one, and where each patch is.
    Outputs, in the package's precision: visual_embeds [F·T, d], T tokens a frame, and deepstack_embeds [K, F·T, d].
    """
    builder = _VisionBuilder(spec, precision)
    return ModelGraph(builder.model(), tuple(builder.weights.values()))


class _VisionBuilder:
    def __init__(self, spec: VisionSpec, precision: Precision) -> None:
        self.spec, self.modules, self.precision = spec, spec.modules, precision
        self.b = GraphBuilder()
        self.weights: dict[str, Weight] = {}
        self._shapes = spec.tensors()
        self._float = TENSOR_TYPES[precision.dtype]

    def weight(self, name: str, *shape: int) -> str:
        """Declare a weight; with a shape that differs from the checkpoint's, its bytes in that shape."""
        name = f"{self.spec.prefix}{name}"
        self.weights.setdefault(name, Weight(name, shape or self._shapes[name], self.precision.dtype))
        return name

    def linear(self, value: str, module: str, *shape: int) -> str:
        weight, bias = self.weight(f"{module}.weight", *shape), f"{module}.bias"
        has_bias = f"{self.spec.prefix}{bias}" in self._shapes
        name = f"{self.spec.prefix}{module}"
        return self.b.linear(value, weight, self.weight(bias) if has_bias else None, name=name)

    def norm(self, value: str, module: str) -> str:
        name, weight = f"{self.spec.prefix}{module}", self.weight(f"{module}.weight")
        common: dict[str, Any] = {"name": name, "axis": -1, "epsilon": self.spec.norm_eps}
        if self.spec.rms_norm:
            return self.b.op("RMSNormalization", value, weight, **common, stash_type=1)
        return self.b.op("LayerNormalization", value, weight, self.weight(f"{module}.bias"), **common)

    def embed(self) -> str:
        """Patches, their positions and the class token -> [F·R, h], R rows a frame."""
        b, spec, names = self.b, self.spec, self.modules
        pixels = b.cast(b.op("Reshape", "pixel_values", b.const([-1, spec.patch_dim])), self._float)
        hidden = self.linear(pixels, names.patch, spec.hidden_size, spec.patch_dim)
        if names.position is not None:
            add = self.add_stretched_positions if spec.image_size is None else self.add_positions
            hidden = b.op("Reshape", add(hidden, names.position), b.const([-1, spec.hidden_size]))
        return hidden if names.pre_norm is None else self.norm(hidden, names.pre_norm)

    def add_stretched_positions(self, hidden: str, position: str) -> str:
        """[F·P, h] -> [F, P, h]: each patch has the mean of four embeddings."""
        b = self.b
        name = f"{self.spec.prefix}{position.removesuffix('.weight')}"
        corners = b.cast(b.op("Gather", self.weight(position), "position_index", name=name), TensorProto.FLOAT)
        weighted = b.op("Mul", corners, b.unsqueeze("position_weight", 2))
        shares = b.cast(b.op("ReduceSum", weighted, b.const([0]), keepdims=0), self._float)
        frames = b.op("Reshape", hidden, self.by_frame)
        return b.op("Add", frames, shares)

    def add_positions(self, hidden: str, position: str) -> str:
        """[F·P, h] -> [F, P + 1, h]: the class token goes before the patches; each row has an embedding of its own."""
        b, spec, names = self.b, self.spec, self.modules
        if names.class_embedding is not None:
            frames = b.op("Reshape", hidden, b.const([-1, spec.image_patches, spec.hidden_size]))
            token = b.op("Reshape", self.weight(names.class_embedding), b.const([1, 1, spec.hidden_size]))
            token = b.op("Expand", token, b.shape_of(b.dim("pixel_values", 0), 1, spec.hidden_size))
            hidden = b.op("Concat", token, frames, axis=1)
        return b.op("Add", b.op("Reshape", hidden, self.by_frame), self.weight(position))

    def attention(self, hidden: str, index: int) -> str:
        """Attention within each frame, or within each window of it, on [F·R, h]."""
        b, spec, names, block = self.b, self.spec, self.modules, self.spec.block(index)
        projected = [self.linear(hidden, f"{block}.{name}") for name in names.qkv]
        if len(projected) == 1:
            projected = b.ops("Split", projected, 3, axis=1, num_outputs=3)
        query, key, value = (b.op("Reshape", part, self.by_frame) for part in projected)
        if spec.rotary:
            query, key = (
                b.op("RotaryEmbedding", part, *self.rotary, num_heads=spec.num_heads) for part in (query, key)
            )
        name = f"{spec.prefix}{block}.{names.proj.partition('.')[0]}"
        if spec.window_side is None or index in spec.fullatt_block_indexes:
            attended = b.op(
                VISION_ATTENTION, query, key, value,
                name=name, domain=ATTENTION_DOMAIN, num_heads=spec.num_heads, scale=spec.head_dim**-0.5,
            )  # fmt: skip
        else:
            attended = self.within_windows(query, key, value, name)
        return self.linear(b.op("Reshape", attended, b.const([-1, spec.hidden_size])), f"{block}.{names.proj}")

    def within_windows(self, query: str, key: str, value: str, name: str) -> str:
        """Attention within windows, on [F, P, h]: patches go to their places, and back."""
        b, heads = self.b, self.spec.num_heads
        query, key, value = (
            b.op("Reshape", b.op("Gather", part, "window_patch", axis=1), self.by_window)
            for part in (query, key, value)
        )
        # Windows are small, and so are all scores of one; the mask needs the standard operator.
        attended = b.op(
            "Attention", query, key, value, self.window_mask,
            name=name, q_num_heads=heads, kv_num_heads=heads, scale=self.spec.head_dim**-0.5,
        )  # fmt: skip
        return b.op("Gather", b.op("Reshape", attended, self.windows_by_frame), "window_place", axis=1)

    def block(self, hidden: str, index: int) -> str:
        b, spec, names, block = self.b, self.spec, self.modules, self.spec.block(index)
        hidden = b.op("Add", hidden, self.attention(self.norm(hidden, f"{block}.{names.norm1}"), index))
        normed = self.norm(hidden, f"{block}.{names.norm2}")
        inner = b.activation(self.linear(normed, f"{block}.{names.mlp_in[0]}"), spec.hidden_act)
        for up in names.mlp_in[1:]:
            inner = b.op("Mul", inner, self.linear(normed, f"{block}.{up}"))
        return b.op("Add", hidden, self.linear(inner, f"{block}.{names.mlp_out}"))

    def merge(self, hidden: str, module: str, *, norm_merged: bool) -> str:
        """Patches of a token side by side, then an MLP: [F·P, h] -> [F·T, d]."""
        b, names, merged = self.b, self.modules, self.b.const([-1, self.spec.merged_size])
        if names.merger_norm is None:
            hidden = b.op("Reshape", hidden, merged)
        elif norm_merged:
            hidden = self.norm(b.op("Reshape", hidden, merged), f"{module}.{names.merger_norm}")
        else:
            hidden = b.op("Reshape", self.norm(hidden, f"{module}.{names.merger_norm}"), merged)
        inner = b.activation(self.linear(hidden, f"{module}.{names.merger_in}"), self.spec.merger_act)
        return self.linear(inner, f"{module}.{names.merger_out}")

    def places(self) -> list[onnx.ValueInfoProto]:
        """Declare the inputs that say where patches lie, and make what blocks take of them."""
        b, spec, info = self.b, self.spec, onnx.helper.make_tensor_value_info
        if spec.image_size is not None:
            rows = spec.image_patches + (self.modules.class_embedding is not None)
            self.by_frame = b.const([-1, rows, spec.hidden_size])
            return []
        frames, patches = b.dim("pixel_values", 0), b.dim("pixel_values", 1)
        self.by_frame = b.shape_of(frames, patches, spec.hidden_size)
        inputs = []
        if self.modules.position is not None:
            inputs.append(info("position_index", TensorProto.INT64, [4, "patches"]))
            inputs.append(info("position_weight", TensorProto.FLOAT, [4, "patches"]))
        if spec.rotary:
            angle = b.op("Expand", "rotary_angle", b.shape_of(frames, patches, spec.head_dim // 2))
            self.rotary = [b.cast(b.op(kind, angle), self._float) for kind in ("Cos", "Sin")]
            inputs.append(info("rotary_angle", TensorProto.FLOAT, ["patches", spec.head_dim // 2]))
        if spec.window_side is not None:
            windows, places, keys = (b.dim("window_mask", axis) for axis in range(3))
            self.by_window = b.shape_of(-1, places, spec.hidden_size)
            self.windows_by_frame = b.shape_of(frames, -1, spec.hidden_size)
            mask = b.op("Expand", "window_mask", b.shape_of(frames, windows, places, keys))
            self.window_mask = b.op("Reshape", mask, b.shape_of(-1, 1, places, keys))
            inputs.append(info("window_patch", TensorProto.INT64, ["windows", "places"]))
            inputs.append(info("window_mask", TensorProto.BOOL, ["windows", "places", "keys"]))
            inputs.append(info("window_place", TensorProto.INT64, ["patches"]))
        return inputs

    def patch_rows(self, hidden: str) -> str:
        """The rows [F·R, h] without those of class tokens."""
        if self.modules.class_embedding is None or self.spec.keeps_class_token:
            return hidden
        return self.b.slice(self.b.op("Reshape", hidden, self.by_frame), 1, self.spec.image_patches + 1, 1)

    def model(self) -> onnx.ModelProto:
        b, spec = self.b, self.spec
        places = self.places()
        hidden, deepstack = self.embed(), []
        for index in range(spec.depth):
            hidden = self.block(hidden, index)
            if index in spec.deepstack_visual_indexes:
                module = str(self.modules.deepstack).format(spec.deepstack_visual_indexes.index(index))
                deepstack.append(b.unsqueeze(self.merge(hidden, module, norm_merged=True), 0))
        embeds = self.merge(self.patch_rows(hidden), self.modules.merger, norm_merged=False)
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
                info("pixel_values", TensorProto.FLOAT, ["frames", spec.image_patches or "patches", spec.patch_dim]),
                *places,
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
