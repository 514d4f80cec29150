"""Portable body of PoolUpdate, for one batch row.

State is updated in place when past and present are bound to the same memory. That is safe only if every node that
reads a state tensor runs before the node that writes it, and the runtime orders nodes by data alone. So: attention is
ordered before everything here by `attended`; `counters` is read by one Split; the scatters that write take indices
which depend on every read. Entries outside the pool (recent, then new tokens) are numbered token by token, and within
a token stream by stream.
"""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from trimkv_export.config import Policy
from trimkv_export.graph.builder import GraphBuilder
from trimkv_export.graph.ops import DOMAIN, POOL_UPDATE, PoolUpdateAttributes, pool_update_inputs
from trimkv_export.policy import STATE_TENSORS
from trimkv_export.policy.scores import LOOKAHEAD_LIMIT

__all__ = ["pool_update_function"]

INT64, INT32, FLOAT, DOUBLE = TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT, TensorProto.DOUBLE
END = int(np.iinfo(np.int64).max)


def _branch(b: GraphBuilder, outputs: list[str], name: str) -> onnx.GraphProto:
    infos = [onnx.helper.make_empty_tensor_value_info(output) for output in outputs]
    return onnx.helper.make_graph(b.nodes, name, [], infos)


def _ones(b: GraphBuilder, shape: str, value: int = 1) -> str:
    tensor = onnx.helper.make_tensor("value", INT64, [1], [value])
    return b.op("ConstantOfShape", shape, value=tensor)


def _count(b: GraphBuilder, index: str, size: str) -> str:
    """Number of times each of 0…size−1 occurs in `index` [n]: int64 [size]."""
    return b.op("ScatterElements", _ones(b, size, 0), index, _ones(b, b.op("Shape", index)), axis=0, reduction="add")


def _starts(b: GraphBuilder, index: str, groups: str) -> str:
    """Where each group starts once `index` [n] is sorted: int64 [groups + 1]."""
    one = b.const([1])
    counts = _count(b, b.op("Add", index, one), b.op("Add", groups, b.const([2])))
    return b.slice(b.op("CumSum", counts, b.const(0)), 0, b.op("Add", groups, one), 0)


def _stable_order(b: GraphBuilder, key: str, *, descending: bool) -> str:
    """Indices that sort `key` [n]. TopK puts the lower index first among equals, so the sort is stable."""
    return b.ops("TopK", [key, b.op("Shape", key)], 2, axis=0, largest=int(descending), sorted=1)[1]


def _scores(b: GraphBuilder, log_beta: str, position: str, seen: str, lookahead: int) -> str:
    """policy/scores.py in ONNX: [n] float32."""
    ahead = b.op("Add", seen, b.const([1 if lookahead == 1 else 2]))
    decay = b.op("Mul", log_beta, b.cast(b.op("Sub", ahead, position), FLOAT))
    if lookahead == 1:
        return decay
    x = b.cast(log_beta, DOUBLE)
    near_one = b.op("Greater", x, b.const(-LOOKAHEAD_LIMIT, np.float64))
    x = b.op("Where", near_one, b.const(-1.0, np.float64), x)
    one = b.const(1.0, np.float64)

    def complement(exponent: str) -> str:
        return b.op("Sub", one, b.op("Exp", exponent))

    steps = b.const(float(lookahead), np.float64)
    horizon = b.op("Log", b.op("Div", complement(b.op("Mul", x, steps)), complement(x)))
    horizon = b.op("Where", near_one, b.const(np.log(lookahead), np.float64), horizon)
    return b.op("Add", decay, b.cast(horizon, FLOAT))


def _select(
    b: GraphBuilder, score: str, position: str, stream: str, streams: str, budget: str, attributes: PoolUpdateAttributes
) -> str:
    """policy/selection.py in ONNX: int64 [n], 1 where the entry stays."""
    eviction = attributes.eviction
    # Order by score; among equals by newer position, then by lower stream.
    last_stream = b.op("Sub", streams, b.const([1]))
    tie = b.op("Add", b.op("Mul", position, streams), b.op("Sub", last_stream, stream))
    by_tie = _stable_order(b, tie, descending=True)
    by_score = _stable_order(b, b.op("Gather", score, by_tie), descending=True)
    best_first = b.op("Gather", by_tie, by_score)

    if eviction.policy is Policy.GLOBAL and not eviction.min_tokens_per_head:
        keep = b.slice(best_first, 0, b.op("Mul", streams, budget), 0)
    else:
        best_stream = b.op("Gather", stream, best_first)
        if eviction.policy is Policy.PER_HEAD:
            quota = b.op("Expand", budget, streams)
        else:
            minimum = b.const([eviction.min_tokens_per_head])
            winners = b.slice(best_stream, 0, b.op("Mul", streams, b.op("Sub", budget, minimum)), 0)
            quota = b.op("Add", _count(b, winners, streams), minimum)
        by_stream = _stable_order(b, best_stream, descending=False)
        ordered = b.op("Gather", best_stream, by_stream)
        rank = b.op("Sub", b.arange(b.dim(stream, 0)), b.op("Gather", _starts(b, stream, streams), ordered))
        stays = b.op("Less", rank, b.op("Gather", quota, ordered))
        keep = b.op("Compress", b.op("Gather", best_first, by_stream), stays, axis=0)
    nothing = _ones(b, b.op("Shape", score), 0)
    return b.op("ScatterElements", nothing, keep, _ones(b, b.op("Shape", keep)), axis=0)


def pool_update_function(attributes: PoolUpdateAttributes) -> onnx.FunctionProto:
    """The ten state tensors after a step, from those before it and the step's keys, values and log_betas."""
    b = GraphBuilder()
    layers = range(attributes.num_layers)
    per_layer = b.attribute("num_kv_heads", AttributeProto.INT, [1])
    streams = b.op("Mul", b.attribute("num_layers", AttributeProto.INT, [1]), per_layer)
    interval = b.attribute("evict_every", AttributeProto.INT, [1])
    depth = b.dim("pool_key", 2)

    # `attended` < itself is false, NaN included: a zero that cannot be computed before the last attention has run.
    probe = b.slice(b.reshape("attended", [-1]), 0, 1, 0)
    after_attention = b.cast(b.op("Less", probe, probe), INT64)
    new = b.op("Add", b.cast("step_tokens", INT64), after_attention)  # [1], tokens of this step
    budget = b.cast("budget", INT64)
    seen, live, recent, evictions = b.ops("Split", [b.cast(b.squeeze("counters", 0), INT64)], 4, num_outputs=4)
    seen = b.op("Add", seen, new)
    outside = b.op("Add", recent, new)
    entries = b.op("Mul", outside, streams)
    limit = b.op("Mul", streams, b.op("Add", budget, interval))
    evict = b.op("GreaterOrEqual", b.op("Add", live, entries), limit)  # [1]
    free_tokens = b.op("Div", b.op("Sub", b.dim("pool_position", 1), live), streams)
    moved = b.op("Where", evict, outside, b.op("Min", outside, free_tokens))  # tokens that leave "outside"
    changed = b.op("Greater", moved, b.const([0]))

    def new_rows(kind: str) -> str:
        """This step's valid rows of all layers: [new, L·H, …]."""
        stacked = b.op("Concat", *(f"{kind}_{layer}" for layer in layers), axis=2)
        return b.slice(b.squeeze(stacked, 0), 0, new, 0)

    new_key, new_value, new_log_beta = (new_rows(kind) for kind in ("key", "value", "log_beta"))

    # What moves into the pool, and where to; nothing at all on most decode steps.
    then, otherwise = GraphBuilder("then_"), GraphBuilder("else_")
    moves = _moves(
        then, attributes, depth=depth, streams=streams, budget=budget, evict=evict, seen=seen, live=live,
        recent=recent, outside=outside, entries=entries, moved=moved, new=(new_key, new_value, new_log_beta),
    )  # fmt: skip
    none = [
        otherwise.reshape(otherwise.slice("pool_key", 0, 0, 1), otherwise.shape_of(0, depth)),
        otherwise.reshape(otherwise.slice("pool_value", 0, 0, 1), otherwise.shape_of(0, depth)),
        otherwise.const(np.zeros(0), np.float32),
        otherwise.const(np.zeros(0), np.int32),
        otherwise.const(np.zeros((0, 2))),
        otherwise.op("Identity", "slot_index"),
        otherwise.op("Identity", "stream_start"),
    ]
    key, value, log_beta, position, slots, _, stream_start = b.ops(
        "If",
        [b.squeeze(changed, 0)],
        ["moving_key", "moving_value", "moving_log_beta", "moving_position", "moving_slots",
         "present_slot_index", "present_stream_start"],
        then_branch=_branch(then, moves, "move"),
        else_branch=_branch(otherwise, none, "stay"),
    )  # fmt: skip
    b.op("ScatterND", "pool_key", slots, key, output="present_pool_key")
    b.op("ScatterND", "pool_value", slots, value, output="present_pool_value")
    b.op("ScatterND", "pool_log_beta", slots, log_beta, output="present_pool_log_beta")
    b.op("ScatterND", "pool_position", slots, position, output="present_pool_position")

    # The rest stays recent. Tokens move only when nothing was recent before (or all leave), so what is written now
    # always comes from the step's own tokens, behind the recent ones that stay.
    still = b.op("Where", changed, b.const([0]), recent)
    rest = b.op("Sub", outside, moved)
    written = b.op("Sub", rest, still)
    flat = b.arange(b.op("Mul", written, streams))
    stream = b.op("Mod", flat, streams)
    place = b.op("Add", b.op("Div", flat, streams), still)
    layer, head = b.op("Div", stream, per_layer), b.op("Mod", stream, per_layer)
    index = b.op("Concat", *(b.unsqueeze(v, 1) for v in (b.op("Sub", flat, flat), layer, head, place)), axis=1)
    for name, rows in (("recent_key", new_key), ("recent_value", new_value), ("recent_log_beta", new_log_beta)):
        tail = b.slice(rows, b.op("Sub", new, written), END, 0)
        shape = b.shape_of(b.dim(index, 0)) if name == "recent_log_beta" else b.shape_of(b.dim(index, 0), depth)
        b.op("ScatterND", name, index, b.reshape(tail, shape), output=f"present_{name}")

    evictions = b.op("Add", evictions, b.cast(evict, INT64))
    live = b.cast(b.slice(b.squeeze(stream_start, 0), -1, END, 0), INT64)
    counters = b.op("Concat", seen, live, rest, evictions, axis=0)
    b.op("Unsqueeze", b.cast(counters, INT32), b.const([0]), output="present_counters")

    return b.function(
        DOMAIN,
        POOL_UPDATE,
        pool_update_inputs(attributes.num_layers),
        [f"present_{name}" for name in STATE_TENSORS],
        list(attributes.as_dict()),
        doc_string=(__doc__ or "").strip(),
    )


def _moves(
    b: GraphBuilder,
    attributes: PoolUpdateAttributes,
    *,
    depth: str,
    streams: str,
    budget: str,
    evict: str,
    seen: str,
    live: str,
    recent: str,
    outside: str,
    entries: str,
    moved: str,
    new: tuple[str, str, str],
) -> list[str]:
    """Rows that move into the pool with their slots [m, 2], then slot_index and stream_start as they become."""
    last = b.slice(b.squeeze("stream_start", 0), 1, END, 0)
    first_of = b.slice(
        b.op("CumSum", _count(b, b.cast(last, INT64), b.op("Add", live, b.const([1]))), b.const(0)), 0, live, 0
    )  # stream of each live slot, in slot_index order
    live_slots = b.cast(b.slice(b.squeeze("slot_index", 0), 0, live, 0), INT64)
    numbers = b.arange(entries)
    out_stream = b.op("Mod", numbers, streams)
    out_token = b.op("Add", b.op("Div", numbers, streams), b.op("Sub", seen, outside))

    def with_recent(name: str, rows: str, perm: list[int], *tail: str) -> str:
        """Entries outside the pool: [outside · L·H, …]."""
        shape = b.shape_of(streams, attributes.eviction.evict_every, *tail)
        old = b.op("Transpose", b.slice(b.reshape(name, shape), 0, recent, 1), perm=perm)
        return b.reshape(b.op("Concat", old, rows, axis=0), b.shape_of(entries, *tail))

    out_key = with_recent("recent_key", new[0], [1, 0, 2], depth)
    out_value = with_recent("recent_value", new[1], [1, 0, 2], depth)
    out_log_beta = with_recent("recent_log_beta", new[2], [1, 0])

    choose, fill = GraphBuilder("choose_"), GraphBuilder("fill_")

    def both(pool: str, out: str, convert: Callable[[str], str]) -> str:
        rows = choose.op("Gather", choose.squeeze(pool, 0), live_slots)
        return choose.op("Concat", convert(rows), out, axis=0)

    position = both("pool_position", out_token, lambda rows: choose.cast(rows, INT64))
    score = _scores(
        choose,
        both("pool_log_beta", out_log_beta, lambda rows: rows),
        position,
        seen,
        attributes.eviction.lookahead_steps,
    )
    stream = choose.op("Concat", first_of, out_stream, axis=0)
    chosen = _select(choose, score, position, stream, streams, budget, attributes)
    first = fill.cast(fill.op("Less", numbers, fill.op("Mul", moved, streams)), INT64)
    kept = b.op(
        "If",
        b.squeeze(evict, 0),
        then_branch=_branch(choose, [chosen], "evict"),
        else_branch=_branch(fill, [fill.op("Concat", _ones(fill, live), first, axis=0)], "fill"),
    )
    zero = b.const(0)
    stays = b.op("Greater", b.slice(kept, 0, live, 0), zero)
    moving = b.squeeze(b.op("NonZero", b.slice(kept, live, END, 0)), 0)
    owner = b.op("Expand", streams, b.dim("pool_position", 1))  # L·H marks a free slot
    owner = b.op("ScatterElements", owner, live_slots, b.op("Where", stays, first_of, streams), axis=0)
    free = b.squeeze(b.op("NonZero", b.op("Equal", owner, streams)), 0)
    free = b.slice(free, 0, b.dim(moving, 0), 0)
    owner = b.op("ScatterElements", owner, free, b.op("Gather", out_stream, moving), axis=0)
    slot_index = b.cast(_stable_order(b, owner, descending=False), INT32)
    stream_start = b.cast(_starts(b, owner, streams), INT32)
    places = b.unsqueeze(free, 1)
    return [
        b.op("Gather", out_key, moving),
        b.op("Gather", out_value, moving),
        b.op("Gather", out_log_beta, moving),
        b.cast(b.op("Gather", out_token, moving), INT32),
        b.op("Concat", b.op("Sub", places, places), places, axis=1),
        b.unsqueeze(slot_index, 0),
        b.unsqueeze(stream_start, 0),
    ]
