// PoolAttention: what one warp (decode, merge, simple path) or one block (prefill) does.
#pragma once

#include <cstdint>

#include "attention_rows.h"

namespace trimkv::cuda {

// --- Decode: S·G <= 16 rows for each KV head ------------------------------------------------------------------------

// Division of the work. The entries of a layer's streams form one sequence, head by head; part p takes the p-th share
// of it. A part's result for head h goes to slot p + h of the partial results: along the sequence p or h grows with
// each piece, so no two pieces meet.
struct DecodePlan {
  int32_t parts;  // for each batch row
  int32_t slots;  // partial results for each batch row
  int32_t rows;   // S·G
  size_t stats;   // bytes from the start of the workspace to the statistics
  size_t bytes;
};

TRIMKV_HOST_DEVICE inline DecodePlan PlanDecode(const PoolAttentionArgs& args) {
  const CacheShape& shape = args.shape;
  const int32_t usual = shape.num_slots / shape.num_layers + shape.num_kv_heads * (shape.evict_every + args.steps);
  const int32_t tiles = CeilDiv<int32_t>(usual, kDecodeEntries);
  const int32_t wanted = CeilDiv<int32_t>(kDecodeParts, shape.batch);
  DecodePlan plan;
  plan.parts = wanted < tiles ? wanted : tiles;
  plan.slots = plan.parts + shape.num_kv_heads - 1;
  plan.rows = args.steps * args.group;
  const size_t results = static_cast<size_t>(shape.batch) * plan.slots * plan.rows;
  plan.stats = CeilDiv<size_t>(results * shape.head_dim * sizeof(float), 256) * 256;
  plan.bytes = plan.stats + results * 2 * sizeof(float);
  return plan;
}

// A layer's work of one batch row.
struct LayerWork {
  const int32_t* start;  // [H + 1], within stream_start
  int32_t near;          // entries outside the pool, for each head
  int32_t most;          // N
  int32_t total;
  int32_t share;

  TRIMKV_DEVICE LayerWork(const PoolAttentionArgs& args, int32_t b, int32_t parts) {
    const int32_t heads = args.shape.num_kv_heads;
    start = args.stream_start + static_cast<int64_t>(b) * (args.shape.num_streams() + 1) + args.layer * heads;
    most = args.shape.num_slots;
    near = Clamp(args.counters[static_cast<int64_t>(b) * kNumCounters + kRecentTokens], 0, args.shape.evict_every) +
           Clamp(args.step_tokens[b], 0, args.steps);
    total = Begin(heads);
    share = CeilDiv(CeilDiv(total, parts), static_cast<int32_t>(kDecodeEntries)) * kDecodeEntries;
    if (share < kDecodeEntries) share = kDecodeEntries;  // cannot be, unless the state was damaged
  }
  // Where a head's entries start in the sequence.
  TRIMKV_DEVICE int32_t Begin(int32_t head) const {
    return Clamp(start[head], 0, most) - Clamp(start[0], 0, most) + head * near;
  }
};

// Attention of one part's piece of one head: entries [begin, end) of its stream.
template <class Block, class T, int kDepth>
TRIMKV_DEVICE void DecodePiece(Block& block, const PoolAttentionArgs& args, const DecodePlan& plan, int32_t b,
                               int32_t head, int32_t begin, int32_t end, int32_t slot,
                               Tile<T, kDepth, kDecodeEntries>* tiles) {
  const StreamView<T> view(args, b, head);
  const int lane = block.Lane();
  const auto find = [&](int32_t first) {  // place of this lane's entry, or of the piece's last one
    const int32_t entry = first + lane % kDecodeEntries;
    return view.Find(entry < end ? entry : end - 1);
  };
  int32_t place = find(begin);
  const auto copy = [&](int32_t first, int stage) {
    if (first < end) {
      CopyTile(block, view, lane, kWarpSize, first, end, tiles[stage],
               [&](int entry) { return block.Shuffle(place, entry); });
      place = find(first + kDecodeEntries);  // for the next copy: its latency hides behind this one
    }
    block.CommitCopies();
  };

  copy(begin, 0);
  WarpRows<T, kDepth> rows;
  const int32_t asking = args.group * view.fresh;  // rows of valid tokens
  rows.Start(block, args, view, b, head, 0, asking);
  int stage = 0;
  for (int32_t first = begin; first < end; first += kDecodeEntries) {
    copy(first + kDecodeEntries, stage ^ 1);
    block.template WaitCopies<1>();
    block.SyncWarp();
    rows.Attend(block, tiles[stage], first, end, args.scale * kLog2E);
    block.SyncWarp();  // all lanes are done with this stage before it is filled again
    stage ^= 1;
  }
  block.template WaitCopies<0>();
  rows.Finish(block);

  const int64_t result = (static_cast<int64_t>(b) * plan.slots + slot) * plan.rows;
  float* partial = static_cast<float*>(args.workspace) + result * view.depth;
  float* stats = reinterpret_cast<float*>(static_cast<char*>(args.workspace) + plan.stats) + result * 2;
  TRIMKV_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int32_t r = lane / 4 + 8 * half;
    if (r >= asking) continue;
    TRIMKV_UNROLL
    for (int n = 0; n < kDepth / 8; ++n) {
      const int column = 8 * n + 2 * (lane % 4);
      if (8 * n >= view.depth) continue;
      float* to = partial + static_cast<int64_t>(r) * view.depth + column;
      to[0] = rows.attended[n][2 * half];
      to[1] = rows.attended[n][2 * half + 1];
    }
    if (lane % 4 == 0) {
      stats[2 * r] = rows.most[half];
      stats[2 * r + 1] = rows.sum[half];
    }
  }
}

// One warp: part `part` of row `b`. `tiles` [kStages] is the warp's own shared memory.
template <class Block, class T, int kDepth>
TRIMKV_DEVICE void DecodePart(Block& block, const PoolAttentionArgs& args, int32_t b, int32_t part,
                              Tile<T, kDepth, kDecodeEntries>* tiles) {
  const DecodePlan plan = PlanDecode(args);
  if (part >= plan.parts || args.step_tokens[b] <= 0) return;
  const LayerWork work(args, b, plan.parts);
  const int32_t begin = part * work.share;
  const int32_t end = begin + work.share < work.total ? begin + work.share : work.total;
  if (begin >= end) return;
  if (args.shape.head_dim < kDepth) {
    ClearTiles(tiles, kStages, block.Lane(), kWarpSize);
    block.SyncWarp();
  }
  const int32_t heads = args.shape.num_kv_heads;
  int32_t head = 0;
  while (head + 1 < heads && work.Begin(head + 1) <= begin) ++head;
  for (int32_t at = begin; at < end && head < heads; ++head) {
    const int32_t first = work.Begin(head);
    const int32_t last = work.Begin(head + 1) < end ? work.Begin(head + 1) : end;
    if (first > at || last <= at) continue;  // cannot be, unless the state was damaged
    DecodePiece<Block, T, kDepth>(block, args, plan, b, head, at - first, last - first, part + head, tiles);
    at = last;
  }
}

// One warp: joins the parts of row `r` of a head, in their order, and writes the result.
template <class Block, class T>
TRIMKV_DEVICE void MergeParts(Block& block, const PoolAttentionArgs& args, int32_t b, int32_t head, int32_t r) {
  const DecodePlan plan = PlanDecode(args);
  const int32_t depth = args.shape.head_dim;
  const int lane = block.Lane();
  T* to = static_cast<T*>(args.attended) + RowOffset(args, b, head, r);
  if (r / args.group >= args.step_tokens[b]) {
    for (int32_t d = lane; d < depth; d += kWarpSize) to[d] = FromFloat<T>(0.0f);
    return;
  }
  const LayerWork work(args, b, plan.parts);
  const int32_t first = Clamp(work.Begin(head) / work.share, 0, plan.parts - 1);
  const int32_t last = Clamp((work.Begin(head + 1) - 1) / work.share, first, plan.parts - 1);
  const int64_t base = static_cast<int64_t>(b) * plan.slots + head;  // of part 0
  const float* partials = static_cast<const float*>(args.workspace);
  const float* stats = reinterpret_cast<const float*>(static_cast<const char*>(args.workspace) + plan.stats);
  const auto result = [&](int32_t part) { return (base + part) * plan.rows + r; };

  float most = MinusInfinity();
  for (int32_t part = first + lane; part <= last; part += kWarpSize) {
    const float own = stats[2 * result(part)];
    most = own > most ? own : most;
  }
  TRIMKV_UNROLL
  for (int mask = 1; mask < kWarpSize; mask *= 2) {
    const float other = block.ShuffleXor(most, mask);
    most = other > most ? other : most;
  }

  constexpr int kOwn = 256 / kWarpSize;  // elements of a lane at most: pairs, 64 apart
  float attended[kOwn] = {};
  float sum = 0.0f;
  for (int32_t part = first; part <= last; ++part) {
    const float weight = block.Exp2(stats[2 * result(part)] - most);
    sum += weight * stats[2 * result(part) + 1];
    const float* from = partials + result(part) * depth;
    TRIMKV_UNROLL
    for (int i = 0; i < kOwn; i += 2) {
      const int32_t d = kWarpSize * i + 2 * lane;
      if (d >= depth) continue;
      attended[i] += weight * from[d];
      attended[i + 1] += weight * from[d + 1];
    }
  }
  TRIMKV_UNROLL
  for (int i = 0; i < kOwn; i += 2) {
    const int32_t d = kWarpSize * i + 2 * lane;
    if (d < depth) *reinterpret_cast<uint32_t*>(to + d) = Pack<T>(attended[i] / sum, attended[i + 1] / sum);
  }
}

// --- Prefill --------------------------------------------------------------------------------------------------------

inline constexpr int kPrefillRows = kPrefillWarps * kTileRows;

// One block of kPrefillWarps: rows `first_row`… of a head. `tiles` [kStages] is in shared memory.
template <class Block, class T, int kDepth>
TRIMKV_DEVICE void Prefill(Block& block, const PoolAttentionArgs& args, int32_t b, int32_t head, int32_t first_row,
                           Tile<T, kDepth, kPrefillEntries>* tiles) {
  const StreamView<T> view(args, b, head);
  const int lane = block.Lane();
  const int32_t asking = args.group * view.fresh;  // rows of valid tokens
  const int32_t warp_row = first_row + block.Warp() * kTileRows;

  WarpRows<T, kDepth> rows;
  rows.Start(block, args, view, b, head, warp_row, asking);
  if (first_row < asking) {
    const int32_t last_row = (first_row + kPrefillRows < asking ? first_row + kPrefillRows : asking) - 1;
    const int32_t end = view.Limit(last_row / args.group);
    const auto copy = [&](int32_t first, int stage) {
      if (first < end) {
        CopyTile(block, view, block.Thread(), block.Threads(), first, end, tiles[stage],
                 [&](int entry) { return view.Find(first + entry < end ? first + entry : end - 1); });
      }
      block.CommitCopies();
    };
    if (view.depth < kDepth) {
      ClearTiles(tiles, kStages, block.Thread(), block.Threads());
      block.Sync();
    }
    copy(0, 0);
    int stage = 0;
    for (int32_t first = 0; first < end; first += kPrefillEntries) {
      copy(first + kPrefillEntries, stage ^ 1);
      block.template WaitCopies<1>();
      block.Sync();
      rows.Attend(block, tiles[stage], first, end, args.scale * kLog2E);
      block.Sync();
      stage ^= 1;
    }
    block.template WaitCopies<0>();
  }
  rows.Finish(block);

  T* base = static_cast<T*>(args.attended);
  TRIMKV_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int32_t r = warp_row + lane / 4 + 8 * half;
    if (r >= args.steps * args.group) continue;
    const float scale = r < asking ? 1.0f / rows.sum[half] : 0.0f;
    uint32_t* to = reinterpret_cast<uint32_t*>(base + RowOffset(args, b, head, r) + 2 * (lane % 4));
    TRIMKV_UNROLL
    for (int n = 0; n < kDepth / 8; ++n) {
      if (8 * n >= view.depth) continue;
      to[4 * n] = Pack<T>(rows.attended[n][2 * half] * scale, rows.attended[n][2 * half + 1] * scale);
    }
  }
}

// --- Any type, any head dimension up to 256 -------------------------------------------------------------------------

// One warp: row `r` of a head, entry by entry.
template <class Block, class T>
TRIMKV_DEVICE void SimpleRow(Block& block, const PoolAttentionArgs& args, int32_t b, int32_t head, int32_t r) {
  constexpr int kOwn = 256 / kWarpSize;
  const StreamView<T> view(args, b, head);
  const int lane = block.Lane();
  const int64_t offset = RowOffset(args, b, head, r);
  T* to = static_cast<T*>(args.attended) + offset;
  if (r / args.group >= view.fresh) {
    for (int32_t d = lane; d < view.depth; d += kWarpSize) to[d] = FromFloat<T>(0.0f);
    return;
  }
  float query[kOwn], attended[kOwn] = {};
  TRIMKV_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    const int32_t d = kWarpSize * i + lane;
    query[i] = d < view.depth ? ToFloat(static_cast<const T*>(args.query)[offset + d]) : 0.0f;
  }
  float most = MinusInfinity();
  float sum = 0.0f;
  const int32_t end = view.Limit(r / args.group);
  for (int32_t entry = 0; entry < end; ++entry) {
    const T *key, *value;
    view.Rows(view.Find(entry), &key, &value);
    float logit = 0.0f;
    TRIMKV_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const int32_t d = kWarpSize * i + lane;
      if (d < view.depth) logit += query[i] * ToFloat(key[d]);
    }
    TRIMKV_UNROLL
    for (int mask = 1; mask < kWarpSize; mask *= 2) logit += block.ShuffleXor(logit, mask);
    logit *= args.scale * kLog2E;
    const float highest = logit > most ? logit : most;
    const float decay = block.Exp2(most - highest);
    const float weight = block.Exp2(logit - highest);
    most = highest;
    sum = sum * decay + weight;
    TRIMKV_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const int32_t d = kWarpSize * i + lane;
      if (d < view.depth) attended[i] = attended[i] * decay + weight * ToFloat(value[d]);
    }
  }
  TRIMKV_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    const int32_t d = kWarpSize * i + lane;
    if (d < view.depth) to[d] = FromFloat<T>(attended[i] / sum);
  }
}

}  // namespace trimkv::cuda
