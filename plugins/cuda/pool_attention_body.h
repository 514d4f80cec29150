// PoolAttention: what one warp (decode, simple path) or one block (prefill) does.
//
// The rows of one KV head are its S·G queries, token-major: row r is token r / G, query head r % G of the group. The
// entries of one stream are numbered pool, then recent, then this step's tokens, so that what a row may see is always
// the entries below one limit.
#pragma once

#include <cstdint>

#include "block.h"
#include "trimkv/kernels.h"

namespace trimkv::cuda {

inline constexpr int kTileRows = 16;       // rows of one warp, the M of the matrix instruction
inline constexpr int kDecodeEntries = 16;  // entries of one tile
inline constexpr int kPrefillEntries = 32;
inline constexpr int kDecodeWarps = 2;  // of a block; they share nothing but the launch
inline constexpr int kPrefillWarps = 4;
inline constexpr int kMergeWarps = 4;
inline constexpr int kStages = 2;          // tiles in shared memory: one in use, one arriving
inline constexpr int kVector = 8;          // 16-bit elements of a 16-byte copy
inline constexpr int kDecodeParts = 1536;  // warps for all rows together: 12 for each of an H200's multiprocessors
inline constexpr float kLog2E = 1.44269504088896340736f;

TRIMKV_DEVICE float MinusInfinity() { return -__builtin_huge_valf(); }

// --- One stream -----------------------------------------------------------------------------------------------------

// The entries of one stream of one batch row.
template <class T>
struct StreamView {
  const int32_t* slots;   // [pooled]
  const T* pool_key;      // [N, D]
  const T* pool_value;    // [N, D]
  const T* recent_key;    // [b, D]
  const T* recent_value;  // [b, D]
  const T* key;           // [S] rows, `stride` elements apart
  const T* value;
  int32_t pooled, recent, fresh, depth;
  int64_t stride;

  TRIMKV_DEVICE StreamView(const PoolAttentionArgs& args, int32_t b, int32_t head) {
    const CacheShape& shape = args.shape;
    const int32_t stream = args.layer * shape.num_kv_heads + head;
    const int32_t* start = args.stream_start + static_cast<int64_t>(b) * (shape.num_streams() + 1) + stream;
    const int64_t pool = static_cast<int64_t>(b) * shape.num_slots;
    const int64_t recent_row = (static_cast<int64_t>(b) * shape.num_streams() + stream) * shape.evict_every;
    depth = shape.head_dim;
    stride = static_cast<int64_t>(shape.num_kv_heads) * depth;
    const int64_t fresh_row = static_cast<int64_t>(b) * args.steps * stride + static_cast<int64_t>(head) * depth;
    slots = args.slot_index + pool + start[0];
    pooled = start[1] - start[0];
    recent = args.counters[static_cast<int64_t>(b) * kNumCounters + kRecentTokens];
    fresh = args.step_tokens[b];
    pool_key = static_cast<const T*>(args.pool_key) + pool * depth;
    pool_value = static_cast<const T*>(args.pool_value) + pool * depth;
    recent_key = static_cast<const T*>(args.recent_key) + recent_row * depth;
    recent_value = static_cast<const T*>(args.recent_value) + recent_row * depth;
    key = static_cast<const T*>(args.key) + fresh_row;
    value = static_cast<const T*>(args.value) + fresh_row;
  }

  // Where an entry is: its slot, or below zero its number outside the pool.
  TRIMKV_DEVICE int32_t Find(int32_t entry) const { return entry < pooled ? slots[entry] : pooled - 1 - entry; }

  TRIMKV_DEVICE void Rows(int32_t place, const T** key_row, const T** value_row) const {
    const bool in_pool = place >= 0;
    const int32_t near = -1 - place;
    const bool is_recent = near < recent;
    const int64_t at = in_pool     ? static_cast<int64_t>(place) * depth
                       : is_recent ? static_cast<int64_t>(near) * depth
                                   : (near - recent) * stride;
    *key_row = (in_pool ? pool_key : is_recent ? recent_key : key) + at;
    *value_row = (in_pool ? pool_value : is_recent ? recent_value : value) + at;
  }

  // Entries below this are visible to the query of a token of this step.
  TRIMKV_DEVICE int32_t Limit(int32_t token) const { return pooled + recent + token + 1; }
};

// Element where row `r` of a KV head starts in query and attended.
TRIMKV_DEVICE int64_t RowOffset(const PoolAttentionArgs& args, int32_t b, int32_t head, int32_t r) {
  const int64_t token = static_cast<int64_t>(b) * args.steps + r / args.group;
  const int64_t query_head = static_cast<int64_t>(head) * args.group + r % args.group;
  return (token * args.shape.num_kv_heads * args.group + query_head) * args.shape.head_dim;
}

// --- Tiles of entries in shared memory ------------------------------------------------------------------------------

// Keys and values of kEntries entries. Rows are padded by one vector so that eight of them meet no bank twice.
template <class T, int kDepth, int kEntries>
struct Tile {
  static constexpr int kPitch = kDepth + kVector;
  T key[kEntries][kPitch];
  T value[kEntries][kPitch];
};

// Starts copying entries `first`… of a stream (zeros from `end` on) by `size` threads; `find(i)` gives the place of the
// tile's i-th entry, and every thread asks for the same number of them.
template <class Block, class T, int kDepth, int kEntries, class Find>
TRIMKV_DEVICE void CopyTile(Block& block, const StreamView<T>& view, int rank, int size, int32_t first, int32_t end,
                            Tile<T, kDepth, kEntries>& tile, const Find& find) {
  const int vectors = view.depth / kVector;
  const int rounds = CeilDiv(kEntries * vectors, size);
  for (int round = 0; round < rounds; ++round) {
    const int item = round * size + rank;
    const int entry = item / vectors;
    const int column = item % vectors * kVector;
    const int32_t place = find(entry < kEntries ? entry : kEntries - 1);
    if (entry >= kEntries) continue;
    const T *key_row, *value_row;
    view.Rows(place, &key_row, &value_row);
    const bool valid = first + entry < end;
    block.CopyAsync(&tile.key[entry][column], key_row + column, valid);
    block.CopyAsync(&tile.value[entry][column], value_row + column, valid);
  }
}

// Zeros in the columns that no copy reaches, which the matrix instruction reads all the same.
template <class T, int kDepth, int kEntries>
TRIMKV_DEVICE void ClearTiles(Tile<T, kDepth, kEntries>* tiles, int count, int rank, int size) {
  uint32_t* words = reinterpret_cast<uint32_t*>(tiles);
  const int total = count * static_cast<int>(sizeof(Tile<T, kDepth, kEntries>) / sizeof(uint32_t));
  for (int i = rank; i < total; i += size) words[i] = 0;
}

// --- One warp's rows ------------------------------------------------------------------------------------------------

// Online softmax of 16 rows. A lane holds rows lane / 4 and lane / 4 + 8 ("halves"), and in each group of 8 columns the
// two from 2·(lane % 4).
template <class T, int kDepth>
struct WarpRows {
  uint32_t query[kDepth / 16][4];
  float attended[kDepth / 8][4];
  float most[2];     // largest logit so far, base 2
  float sum[2];      // of this lane's columns only, until Finish
  int32_t limit[2];  // entries below it are visible

  // Takes rows `first_row`…; rows behind `count` see nothing.
  template <class Block>
  TRIMKV_DEVICE void Start(Block& block, const PoolAttentionArgs& args, const StreamView<T>& view, int32_t b,
                           int32_t head, int32_t first_row, int32_t count) {
    const T* base = static_cast<const T*>(args.query);
    const int column = 2 * (block.Lane() % 4);
    TRIMKV_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int32_t r = first_row + block.Lane() / 4 + 8 * half;
      const bool asks = r < count;
      const T* row = base + (asks ? RowOffset(args, b, head, r) : 0);
      most[half] = MinusInfinity();
      sum[half] = 0.0f;
      limit[half] = asks ? view.Limit(r / args.group) : 0;
      TRIMKV_UNROLL
      for (int k = 0; k < kDepth / 16; ++k) {
        const int low = 16 * k + column;
        query[k][half] = asks && low < view.depth ? *reinterpret_cast<const uint32_t*>(row + low) : 0;
        query[k][half + 2] = asks && low + 8 < view.depth ? *reinterpret_cast<const uint32_t*>(row + low + 8) : 0;
      }
    }
    TRIMKV_UNROLL
    for (int n = 0; n < kDepth / 8; ++n) {
      TRIMKV_UNROLL
      for (int i = 0; i < 4; ++i) attended[n][i] = 0.0f;
    }
  }

  // Takes in a tile whose first entry is `first`; entries from `end` on are not there. `scale` includes log2(e).
  template <class Block, int kEntries>
  TRIMKV_DEVICE void Attend(Block& block, const Tile<T, kDepth, kEntries>& tile, int32_t first, int32_t end,
                            float scale) {
    const int matrix = block.Lane() / 8;
    const int matrix_row = block.Lane() % 8;

    float logits[kEntries / 8][4] = {};
    TRIMKV_UNROLL
    for (int k = 0; k < kDepth / 16; ++k) {
      TRIMKV_UNROLL
      for (int n = 0; n < kEntries / 16; ++n) {
        uint32_t keys[4];  // entries 0-7: depth 0-7, 8-15; entries 8-15: the same
        block.LoadMatrices(keys, &tile.key[16 * n + 8 * (matrix / 2) + matrix_row][16 * k + 8 * (matrix % 2)]);
        block.Multiply(T{}, logits[2 * n], query[k], keys[0], keys[1]);
        block.Multiply(T{}, logits[2 * n + 1], query[k], keys[2], keys[3]);
      }
    }

    const int32_t column = first + 2 * (block.Lane() % 4);
    TRIMKV_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int32_t visible = limit[half] < end ? limit[half] : end;
      float highest = most[half];
      TRIMKV_UNROLL
      for (int n = 0; n < kEntries / 8; ++n) {
        TRIMKV_UNROLL
        for (int i = 0; i < 2; ++i) {
          float& logit = logits[n][2 * half + i];
          logit = column + 8 * n + i < visible ? logit * scale : MinusInfinity();
          highest = logit > highest ? logit : highest;
        }
      }
      TRIMKV_UNROLL
      for (int mask = 1; mask < 4; mask *= 2) {
        const float other = block.ShuffleXor(highest, mask);
        highest = other > highest ? other : highest;
      }
      const float base = highest == MinusInfinity() ? 0.0f : highest;  // nothing seen yet: avoid inf − inf
      const float decay = block.Exp2(most[half] - base);
      most[half] = highest;
      sum[half] *= decay;
      TRIMKV_UNROLL
      for (int n = 0; n < kEntries / 8; ++n) {
        TRIMKV_UNROLL
        for (int i = 0; i < 2; ++i) {
          float& weight = logits[n][2 * half + i];
          weight = block.Exp2(weight - base);
          sum[half] += weight;
        }
      }
      TRIMKV_UNROLL
      for (int n = 0; n < kDepth / 8; ++n) {
        attended[n][2 * half] *= decay;
        attended[n][2 * half + 1] *= decay;
      }
    }

    TRIMKV_UNROLL
    for (int n = 0; n < kEntries / 16; ++n) {
      const uint32_t weights[4] = {
          Pack<T>(logits[2 * n][0], logits[2 * n][1]), Pack<T>(logits[2 * n][2], logits[2 * n][3]),
          Pack<T>(logits[2 * n + 1][0], logits[2 * n + 1][1]), Pack<T>(logits[2 * n + 1][2], logits[2 * n + 1][3])};
      TRIMKV_UNROLL
      for (int d = 0; d < kDepth / 16; ++d) {
        uint32_t values[4];  // depth 0-7: entries 0-7, 8-15; depth 8-15: the same
        block.LoadMatricesTransposed(values,
                                     &tile.value[16 * n + 8 * (matrix % 2) + matrix_row][16 * d + 8 * (matrix / 2)]);
        block.Multiply(T{}, attended[2 * d], weights, values[0], values[1]);
        block.Multiply(T{}, attended[2 * d + 1], weights, values[2], values[3]);
      }
    }
  }

  // Makes `sum` whole.
  template <class Block>
  TRIMKV_DEVICE void Finish(Block& block) {
    TRIMKV_UNROLL
    for (int half = 0; half < 2; ++half) {
      TRIMKV_UNROLL
      for (int mask = 1; mask < 4; mask *= 2) sum[half] += block.ShuffleXor(sum[half], mask);
    }
  }
};

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
  int32_t total;
  int32_t share;

  TRIMKV_DEVICE LayerWork(const PoolAttentionArgs& args, int32_t b, int32_t parts) {
    const int32_t heads = args.shape.num_kv_heads;
    start = args.stream_start + static_cast<int64_t>(b) * (args.shape.num_streams() + 1) + args.layer * heads;
    near = args.counters[static_cast<int64_t>(b) * kNumCounters + kRecentTokens] + args.step_tokens[b];
    total = Begin(heads);
    share = CeilDiv(CeilDiv(total, parts), static_cast<int32_t>(kDecodeEntries)) * kDecodeEntries;
  }
  // Where a head's entries start in the sequence.
  TRIMKV_DEVICE int32_t Begin(int32_t head) const { return start[head] - start[0] + head * near; }
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
  int32_t head = 0;
  while (work.Begin(head + 1) <= begin) ++head;
  for (int32_t at = begin; at < end; ++head) {
    const int32_t first = work.Begin(head);
    const int32_t last = work.Begin(head + 1) < end ? work.Begin(head + 1) : end;
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
  const int32_t first = work.Begin(head) / work.share;
  const int32_t last = (work.Begin(head + 1) - 1) / work.share;
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
