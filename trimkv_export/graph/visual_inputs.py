"""How a step's visual tokens enter the decoder: rows of the hidden states replaced, then DeepStack features added.

The tokens are given by their places, not by a mask: TensorRT-RTX has neither NonZero nor scatter reductions. With no
visual token in a step (V = 0) the nodes move nothing.
"""

import onnx
from onnx import TensorProto

from trimkv_export.graph.builder import GraphBuilder
from trimkv_export.models import DecoderSpec

__all__ = ["VisualInputs"]


class VisualInputs:
    """Three inputs of the graph, and the nodes that read them.

    `visual_index` [V] int64, row * S + token: the visual tokens of this step, each once; `visual_embeds` [V, d];
    `deepstack_embeds` [K, V, d], left out when K is 0.
    """

    def __init__(self, builder: GraphBuilder, spec: DecoderSpec) -> None:
        self._b, self._spec = builder, spec
        self._places = ""  # visual_index [V, 1], for ScatterND

    def inputs(self, float_type: int) -> list[onnx.ValueInfoProto]:
        """Declarations, the embeddings with the element type of the hidden states."""
        info, width, layers = onnx.helper.make_tensor_value_info, self._spec.hidden_size, self._spec.deepstack_layers
        out = [
            info("visual_index", TensorProto.INT64, ["visual"]),
            info("visual_embeds", float_type, ["visual", width]),
        ]
        return [*out, info("deepstack_embeds", float_type, [layers, "visual", width])] if layers else out

    def _scatter(self, hidden: str, rows: str, name: str) -> str:
        if not self._places:
            self._places = self._b.unsqueeze("visual_index", 1)
        return self._b.op("ScatterND", hidden, self._places, rows, name=name)

    def replace(self, hidden: str) -> str:
        """The hidden states [B·S, d] with the visual tokens' rows replaced."""
        return self._scatter(hidden, "visual_embeds", f"{self._spec.prefix}visual_embeds")

    def add_deepstack(self, hidden: str, layer: int) -> str:
        """The output [B·S, d] of a layer plus its DeepStack feature; unchanged behind the first K layers."""
        if layer >= self._spec.deepstack_layers:
            return hidden
        b, name = self._b, f"{self._spec.layer(layer)}.deepstack"
        feature = b.op("Gather", "deepstack_embeds", b.const(layer))
        rows = b.op("Add", b.op("Gather", hidden, "visual_index"), feature, name=f"{name}.add")
        return self._scatter(hidden, rows, name)
