// What the attention kernels share: the entries of one stream, tiles of them in shared memory, and the online softmax
// of one warp's rows.
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
  int32_t pooled, recent, fresh, depth, last_slot;
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
    // Clamped, here and in Find: a damaged state gives wrong numbers, never an access outside the cache.
    const int32_t begin = Clamp(start[0], 0, shape.num_slots);
    slots = args.slot_index + pool + begin;
    pooled = Clamp(start[1], begin, shape.num_slots) - begin;
    recent = Clamp(args.counters[static_cast<int64_t>(b) * kNumCounters + kRecentTokens], 0, shape.evict_every);
    fresh = Clamp(args.step_tokens[b], 0, args.steps);
    last_slot = shape.num_slots - 1;
    pool_key = static_cast<const T*>(args.pool_key) + pool * depth;
    pool_value = static_cast<const T*>(args.pool_value) + pool * depth;
    recent_key = static_cast<const T*>(args.recent_key) + recent_row * depth;
    recent_value = static_cast<const T*>(args.recent_value) + recent_row * depth;
    key = static_cast<const T*>(args.key) + fresh_row;
    value = static_cast<const T*>(args.value) + fresh_row;
  }

  // Where an entry is: its slot, or below zero its number outside the pool.
  TRIMKV_DEVICE int32_t Find(int32_t entry) const {
    return entry < pooled ? Clamp(slots[entry], 0, last_slot) : pooled - 1 - entry;
  }

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

}  // namespace trimkv::cuda
