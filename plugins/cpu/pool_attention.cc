// PoolAttention on the CPU: softmax attention of each query over what is live of its stream.
//
// Decoding (few query rows): the entries of all heads are cut into segments of equal size, so that threads stay busy
// however unevenly the pool is spread over heads; partial softmaxes are merged at the end, in a fixed order. Prefill
// (many query rows): each block of query rows goes through all entries of its head.
#include "cpu/pool_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/attention_tile.h"

namespace trimkv::cpu {
namespace {

constexpr int32_t kSegment = 512;  // pool entries of one task when decoding

// A softmax in the workspace: max [kMaxRows], sum [kMaxRows], acc [kMaxRows, D].
size_t SoftmaxFloats(const CacheShape& shape) { return static_cast<size_t>(kMaxRows) * (shape.head_dim + 2); }

RunningSoftmax SoftmaxAt(float* base) { return {base, base + kMaxRows, base + 2 * kMaxRows}; }

// Most segments of one batch row: full ones of the pool, and a last one of each head.
size_t MaxSegments(const CacheShape& shape) {
  return static_cast<size_t>(shape.num_slots) / kSegment + static_cast<size_t>(shape.num_kv_heads);
}

bool IsDecode(const PoolAttentionArgs& args) { return args.steps * args.group <= kMaxRows; }

// One KV head of one batch row.
class Head {
 public:
  Head(const PoolAttentionArgs& args, int32_t row, int32_t head) : args_(args), row_(row), head_(head) {
    const CacheShape& shape = args.shape;
    const size_t slots = static_cast<size_t>(row) * shape.num_slots;
    const int32_t stream = args.layer * shape.num_kv_heads + head;
    const int32_t* start = args.stream_start + static_cast<size_t>(row) * (shape.num_streams() + 1) + stream;
    bytes_ = shape.head_dim * ItemSize(args.type);
    tokens = args.step_tokens[row];
    recent_ = args.counters[row * kNumCounters + kRecentTokens];
    pool_entries = start[1] - start[0];
    following_ = start[shape.num_kv_heads - head] - start[1];
    index_ = args.slot_index + slots + start[0];
    pool_key_ = static_cast<const char*>(args.pool_key) + slots * bytes_;
    pool_value_ = static_cast<const char*>(args.pool_value) + slots * bytes_;
    const size_t recent =
        (static_cast<size_t>(row) * shape.num_streams() + stream) * static_cast<size_t>(shape.evict_every) * bytes_;
    recent_key_ = static_cast<const char*>(args.recent_key) + recent;
    recent_value_ = static_cast<const char*>(args.recent_value) + recent;
    const size_t fresh = (static_cast<size_t>(row) * args.steps * shape.num_kv_heads + head) * bytes_;
    key_ = static_cast<const char*>(args.key) + fresh;
    value_ = static_cast<const char*>(args.value) + fresh;
  }

  int32_t tokens;        // valid query tokens
  int32_t pool_entries;  // live pool entries of this stream

  int32_t num_segments() const { return std::max(1, (pool_entries + kSegment - 1) / kSegment); }
  int32_t num_rows() const { return tokens * args_.group; }

  // Query rows [first, first + rows) as scaled floats. Row r is query head r % G of token r / G.
  void LoadQuery(int32_t first, int rows, float* to) const {
    const int dim = args_.shape.head_dim;
    for (int r = 0; r < rows; ++r) {
      GetTileKernels().to_float(static_cast<const char*>(args_.query) + QueryRow(first + r) * bytes_, args_.type, dim,
                                to + r * dim);
      for (int d = 0; d < dim; ++d) to[r * dim + d] *= args_.scale;
    }
  }
  void StoreRow(int32_t row, const float* from) const {
    GetTileKernels().from_float(from, args_.type, args_.shape.head_dim,
                                static_cast<char*>(args_.attended) + QueryRow(row) * bytes_);
  }

  // Segment `segment` of the pool, and with the last one what is near (recent and new tokens), for query rows
  // [first, first + rows).
  void AttendSegment(int32_t segment, const float* query, int32_t first, int rows, const RunningSoftmax& state) const {
    int visible[kMaxRows];
    const int32_t end = std::min(pool_entries, (segment + 1) * kSegment);
    for (int32_t at = segment * kSegment; at < end; at += kTile) {
      const int count = std::min(kTile, end - at);
      std::fill_n(visible, rows, count);
      Tile({pool_key_, pool_value_, index_ + at, bytes_, bytes_, count, pool_entries + following_ - at - count}, query,
           rows, visible, state);
    }
    if (segment + 1 < num_segments()) return;
    for (int32_t at = 0; at < recent_; at += kTile) {
      const int count = std::min(kTile, recent_ - at);
      std::fill_n(visible, rows, count);
      Tile({recent_key_ + at * bytes_, recent_value_ + at * bytes_, nullptr, bytes_, bytes_, count, 0}, query, rows,
           visible, state);
    }
    const size_t stride = args_.shape.num_kv_heads * bytes_;
    const int32_t last_token = (first + rows - 1) / args_.group;
    for (int32_t at = 0; at <= last_token; at += kTile) {
      const int count = std::min(kTile, last_token + 1 - at);
      for (int r = 0; r < rows; ++r) visible[r] = std::clamp((first + r) / args_.group + 1 - at, 0, count);
      Tile({key_ + at * stride, value_ + at * stride, nullptr, stride, bytes_, count, 0}, query, rows, visible, state);
    }
  }

 private:
  size_t QueryRow(int32_t row) const {
    const int32_t heads = args_.shape.num_kv_heads * args_.group;
    return (static_cast<size_t>(row_) * args_.steps + row / args_.group) * heads + head_ * args_.group +
           row % args_.group;
  }
  void Tile(const Entries& entries, const float* query, int rows, const int* visible,
            const RunningSoftmax& state) const {
    GetTileKernels().attend(query, rows, args_.shape.head_dim, args_.type, entries, visible, state);
  }

  const PoolAttentionArgs& args_;
  int32_t row_, head_, recent_;
  int32_t following_;  // pool entries of the layer's later heads, which lie behind in slot_index
  size_t bytes_;
  const int32_t* index_;
  const char *pool_key_, *pool_value_, *recent_key_, *recent_value_, *key_, *value_;
};

void Clear(const RunningSoftmax& state, int rows, int dim) {
  std::fill_n(state.max, rows, -INFINITY);
  std::fill_n(state.sum, rows, 0.0f);
  std::fill_n(state.acc, rows * dim, 0.0f);
}

// Divides by the sum and stores; every row sees at least its own token, so no sum is 0.
void Finish(const Head& head, int32_t first, int rows, int dim, const RunningSoftmax& state) {
  for (int r = 0; r < rows; ++r) {
    const float factor = 1.0f / state.sum[r];
    for (int d = 0; d < dim; ++d) state.acc[r * dim + d] *= factor;
    head.StoreRow(first + r, state.acc + r * dim);
  }
}

// Takes `part` into `total`.
void Merge(const RunningSoftmax& part, int rows, int dim, const RunningSoftmax& total) {
  for (int r = 0; r < rows; ++r) {
    const float highest = std::max(total.max[r], part.max[r]);
    const float old_share = GetTileKernels().exp(total.max[r] - highest);
    const float new_share = GetTileKernels().exp(part.max[r] - highest);
    for (int d = 0; d < dim; ++d) {
      total.acc[r * dim + d] = total.acc[r * dim + d] * old_share + part.acc[r * dim + d] * new_share;
    }
    total.sum[r] = total.sum[r] * old_share + part.sum[r] * new_share;
    total.max[r] = highest;
  }
}

void Prefill(const PoolAttentionArgs& args, const Parallel& parallel) {
  const int32_t heads = args.shape.num_kv_heads, dim = args.shape.head_dim;
  const int32_t blocks = (args.steps * args.group + kMaxRows - 1) / kMaxRows;
  parallel.For(static_cast<size_t>(args.shape.batch) * heads * blocks, [&](size_t task) {
    const int32_t row = static_cast<int32_t>(task / blocks / heads);
    if (args.step_tokens[row] <= 0) return;
    const Head head(args, row, static_cast<int32_t>(task / blocks % heads));
    const int32_t first = static_cast<int32_t>(task % blocks) * kMaxRows;
    const int rows = std::min<int32_t>(kMaxRows, head.num_rows() - first);
    if (rows <= 0) return;
    alignas(64) float query[kMaxRows * kMaxHeadDim], softmax[kMaxRows * (kMaxHeadDim + 2)];
    const RunningSoftmax state = SoftmaxAt(softmax);
    Clear(state, rows, dim);
    head.LoadQuery(first, rows, query);
    for (int32_t segment = 0; segment < head.num_segments(); ++segment) {
      head.AttendSegment(segment, query, first, rows, state);
    }
    Finish(head, first, rows, dim, state);
  });
}

// [B·H + 1] at the start of the workspace: the first segment of each head; partial softmaxes follow.
size_t TableBytes(const CacheShape& shape) {
  const size_t bytes = (static_cast<size_t>(shape.batch) * shape.num_kv_heads + 1) * sizeof(int32_t);
  return (bytes + 63) / 64 * 64;
}

void Decode(const PoolAttentionArgs& args, const Parallel& parallel) {
  const int32_t heads = args.shape.num_kv_heads, dim = args.shape.head_dim, all_heads = args.shape.batch * heads;
  int32_t* const first = static_cast<int32_t*>(args.workspace);
  first[0] = 0;
  for (int32_t i = 0; i < all_heads; ++i) {
    const int32_t row = i / heads;
    first[i + 1] = first[i] + (args.step_tokens[row] > 0 ? Head(args, row, i % heads).num_segments() : 0);
  }
  float* const partial = reinterpret_cast<float*>(static_cast<char*>(args.workspace) + TableBytes(args.shape));
  const size_t stride = SoftmaxFloats(args.shape);
  parallel.For(first[all_heads], [&](size_t task) {
    const int32_t segment = static_cast<int32_t>(task);
    const int32_t i = static_cast<int32_t>(std::upper_bound(first, first + all_heads, segment) - first) - 1;
    const Head head(args, i / heads, i % heads);
    alignas(64) float query[kMaxRows * kMaxHeadDim];
    const RunningSoftmax state = SoftmaxAt(partial + task * stride);
    Clear(state, head.num_rows(), dim);
    head.LoadQuery(0, head.num_rows(), query);
    head.AttendSegment(segment - first[i], query, 0, head.num_rows(), state);
  });
  for (int32_t i = 0; i < all_heads; ++i) {
    if (first[i] == first[i + 1]) continue;
    const Head head(args, i / heads, i % heads);
    const RunningSoftmax total = SoftmaxAt(partial + first[i] * stride);
    for (int32_t segment = first[i] + 1; segment < first[i + 1]; ++segment) {
      Merge(SoftmaxAt(partial + segment * stride), head.num_rows(), dim, total);
    }
    Finish(head, 0, head.num_rows(), dim, total);
  }
}

// Queries behind the valid tokens get zeros.
void ClearPadding(const PoolAttentionArgs& args) {
  const size_t token =
      static_cast<size_t>(args.shape.num_kv_heads) * args.group * args.shape.head_dim * ItemSize(args.type);
  for (int32_t row = 0; row < args.shape.batch; ++row) {
    const int32_t valid = std::clamp(args.step_tokens[row], 0, args.steps);
    std::memset(static_cast<char*>(args.attended) + (static_cast<size_t>(row) * args.steps + valid) * token, 0,
                (args.steps - valid) * token);
  }
}

}  // namespace

size_t PoolAttentionWorkspaceBytes(const PoolAttentionArgs& args) {
  if (!IsDecode(args)) return 0;
  return TableBytes(args.shape) +
         args.shape.batch * MaxSegments(args.shape) * SoftmaxFloats(args.shape) * sizeof(float);
}

void PoolAttention(const PoolAttentionArgs& args, const Parallel& parallel) {
  ClearPadding(args);
  if (IsDecode(args)) {
    Decode(args, parallel);
  } else {
    Prefill(args, parallel);
  }
}

}  // namespace trimkv::cpu
