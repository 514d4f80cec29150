"""Portable body of PoolAttention, for one batch row.

The pool rows of all heads of a layer are gathered once and multiplied with all query heads; logits of other heads'
rows are masked. That spends up to H times the arithmetic of the native kernel, but its cost depends on the number of
live entries alone, never on how they are spread over the heads.
"""

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from trimkv_export.graph.builder import GraphBuilder
from trimkv_export.graph.ops import DOMAIN, POOL_ATTENTION, POOL_ATTENTION_STATE

__all__ = ["pool_attention_function"]


def pool_attention_function() -> onnx.FunctionProto:
    """query [1, S, H·G, D], key and value [1, S, H, D], state -> attended [1, S, H·G, D]."""
    b = GraphBuilder()
    heads = b.attribute("num_kv_heads", AttributeProto.INT, [1])
    layer = b.attribute("layer", AttributeProto.INT)
    steps, depth = b.dim("query", 1), b.dim("query", 3)
    group = b.op("Div", b.dim("query", 2), heads)
    rows = b.op("Mul", steps, group)  # queries of one KV head: S·G, step-major
    minus_infinity = b.const(-np.inf, np.float32)

    def by_head(value: str) -> str:
        """[1, S, H·n, D] -> [H, S·n, D]."""
        split = b.reshape(value, b.shape_of(steps, heads, b.op("Div", b.dim(value, 2), heads), depth))
        return b.reshape(
            b.op("Transpose", split, perm=[1, 0, 2, 3]),
            b.shape_of(heads, b.op("Mul", steps, b.op("Div", b.dim(value, 2), heads)), depth),
        )

    scale = b.op("CastLike", b.attribute("scale", AttributeProto.FLOAT), "query")
    query = b.op("Mul", by_head("query"), scale)

    # Pool: the slots of this layer's streams lie side by side in slot_index.
    first = b.op("Mul", b.reshape(layer, [1]), heads)
    last = b.op("Add", b.op("Add", first, heads), b.const([1]))
    start = b.cast(b.squeeze(b.slice("stream_start", first, last, 1), 0), TensorProto.INT64)  # [H + 1]
    begin, end = b.slice(start, 0, 1, 0), b.slice(start, heads, b.op("Add", heads, b.const([1])), 0)
    slots = b.squeeze(b.slice("slot_index", begin, end, 1), 0)
    live = b.dim(slots, 0)
    pool_key = b.squeeze(b.op("Gather", "pool_key", slots, axis=1), 0)  # [live, D]
    pool_value = b.squeeze(b.op("Gather", "pool_value", slots, axis=1), 0)
    index = b.arange(end, begin)
    lower = b.unsqueeze(b.slice(start, 0, heads, 0), 1, 2)
    upper = b.unsqueeze(b.slice(start, 1, b.op("Add", heads, b.const([1])), 0), 1, 2)
    own = b.op("And", b.op("GreaterOrEqual", index, lower), b.op("Less", index, upper))  # [H, 1, live]
    flat_rows = b.op("Mul", heads, rows)
    pool_logits = b.op("MatMul", b.reshape(query, b.shape_of(flat_rows, depth)), b.op("Transpose", pool_key))
    pool_logits = b.reshape(b.cast(pool_logits, TensorProto.FLOAT), b.shape_of(heads, rows, live))
    pool_logits = b.op("Where", own, pool_logits, minus_infinity)

    # Recent tokens and the step's own: the same for every head, causal among the step's own.
    recent = b.cast(b.slice(b.squeeze("counters", 0), 2, 3, 0), TensorProto.INT64)

    def near(recent_name: str, new: str) -> str:
        """Concatenated rows [H, recent + S, D]."""
        kept = b.slice(b.squeeze(b.op("Gather", recent_name, layer, axis=1), 0), 0, recent, 1)
        return b.op("Concat", kept, by_head(new), axis=1)

    near_key, near_value = near("recent_key", "key"), near("recent_value", "value")
    age = b.op("Sub", b.arange(b.op("Add", recent, steps)), recent)  # below 0: recent
    asking = b.unsqueeze(b.op("Div", b.arange(rows), group), 1)
    visible = b.op("LessOrEqual", age, asking)  # [S·G, recent + S]
    near_logits = b.op("MatMul", query, b.op("Transpose", near_key, perm=[0, 2, 1]))
    near_logits = b.op("Where", visible, b.cast(near_logits, TensorProto.FLOAT), minus_infinity)

    weights = b.op("Softmax", b.op("Concat", pool_logits, near_logits, axis=2), axis=2)
    weights = b.op("CastLike", weights, "query")
    pool_weights = b.reshape(b.slice(weights, 0, live, 2), b.shape_of(flat_rows, live))
    from_pool = b.reshape(b.op("MatMul", pool_weights, pool_value), b.shape_of(heads, rows, depth))
    from_near = b.op("MatMul", b.slice(weights, live, np.iinfo(np.int64).max, 2), near_value)
    attended = b.reshape(b.op("Add", from_pool, from_near), b.shape_of(heads, steps, group, depth))
    b.reshape(b.op("Transpose", attended, perm=[1, 0, 2, 3]), b.op("Shape", "query"), output="attended")

    return b.function(
        DOMAIN,
        POOL_ATTENTION,
        ["query", "key", "value", *POOL_ATTENTION_STATE, "step_tokens"],
        ["attended"],
        ["layer", "num_layers", "num_kv_heads", "scale"],
        doc_string=(__doc__ or "").strip(),
    )
