"""The body of MultiHeadAttention, the contributed operator of ONNX Runtime that the vision tower calls.

ONNX Runtime takes its own kernel, which goes through the keys in blocks and never has all scores. Measured on the CPU
(1.32, two cores, float32, 16 heads of 64, beyond inputs):

    patches  MultiHeadAttention  standard Attention              MatMul/Softmax/MatMul in a Loop over 64 (256) rows
     4,096    82 MB, 0.56 s      1,072 MB, 1.0 s (later 2,128)   161 (330) MB, 1.1 (0.8) s
    16,384   274 MB, 8.3 s       not run: 17 GB of scores

In float16, which its kernel for the CPU lacks, it is cast to float32 and still taken (129 MB). Any other runtime takes
this body; TensorRT-RTX 1.7.1 builds an engine from it.
"""

import onnx

from trimkv_export.graph.builder import OPSET

__all__ = ["ATTENTION_DOMAIN", "VISION_ATTENTION", "vision_attention_function"]

ATTENTION_DOMAIN = "com.microsoft"
VISION_ATTENTION = "MultiHeadAttention"


def vision_attention_function() -> onnx.FunctionProto:
    """MultiHeadAttention(query, key, value) [F, P, heads·D] -> the same shape; attributes num_heads, scale."""
    node = onnx.helper.make_node("Attention", ["query", "key", "value"], ["output"], name="attention")
    for name, source, kind in (
        ("q_num_heads", "num_heads", onnx.AttributeProto.INT),
        ("kv_num_heads", "num_heads", onnx.AttributeProto.INT),
        ("scale", "scale", onnx.AttributeProto.FLOAT),
    ):
        node.attribute.append(onnx.AttributeProto(name=name, type=kind, ref_attr_name=source))
    return onnx.helper.make_function(
        ATTENTION_DOMAIN,
        VISION_ATTENTION,
        ["query", "key", "value"],
        ["output"],
        [node],
        [onnx.helper.make_opsetid("", OPSET)],
        ["num_heads", "scale"],
    )
