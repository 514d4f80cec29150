// PoolUpdate in two parts: PlanRow (one block for each batch row) decides what stays and where things go and rewrites
// the small tensors; MoveRow (many blocks) copies the rows of keys and values.
#pragma once

#include <cstdint>

#include "partition.h"
#include "select.h"
#include "trimkv/kernels.h"
#include "trimkv/scores.h"

namespace trimkv::cuda {

inline constexpr int kPlanThreads = 1024;
inline constexpr int kWarpStreamEntries = 4096;  // a longer stream is ranked by the whole block

// What PlanRow tells MoveRow about a batch row.
struct PlanHeader {
  int32_t moves;           // entries that move into the pool
  int32_t recent;          // tokens that were recent before this step; entries from there on are new tokens
  int32_t first_position;  // position of the oldest token outside the pool
  int32_t written;         // new tokens that become recent: the step's last valid ones
  int32_t first_written;   // the first of them
  int32_t place;           // where in recent the first of them goes
  int32_t unused[10];
};

// Scratch of one batch row. An entry outside the pool has the number token · L·H + stream, recent tokens first.
struct PlanScratch {
  PlanHeader* header;
  uint32_t* keys;            // [N + (b + S)·L·H]: pool slots, then entries outside the pool; used by evictions
  int32_t* owner;            // [N]: stream of each slot, L·H where it is free
  int32_t* moving;           // [moves]: numbers of the entries that move, ascending
  int32_t* slots;            // [moves]: the slots they take, ascending
  uint32_t* threshold_keys;  // [L·H]
  uint64_t* threshold_ties;  // [L·H]
};

struct PlanLayout {
  size_t keys, owner, moving, slots, threshold_keys, threshold_ties, bytes;  // offsets in a row's scratch, its size
  int32_t max_moves;
};

TRIMKV_HOST_DEVICE inline PlanLayout LayOutPlan(const CacheShape& shape, int32_t steps) {
  const size_t slots = static_cast<size_t>(shape.num_slots);
  const size_t streams = static_cast<size_t>(shape.num_streams());
  const size_t outside = static_cast<size_t>(shape.evict_every + steps) * streams;
  const size_t moves = outside < slots ? outside : slots;
  PlanLayout layout;
  layout.max_moves = static_cast<int32_t>(moves);
  layout.threshold_ties = sizeof(PlanHeader);
  layout.threshold_keys = layout.threshold_ties + streams * sizeof(uint64_t);
  layout.keys = layout.threshold_keys + streams * sizeof(uint32_t);
  layout.owner = layout.keys + (slots + outside) * sizeof(uint32_t);
  layout.moving = layout.owner + slots * sizeof(int32_t);
  layout.slots = layout.moving + moves * sizeof(int32_t);
  layout.bytes = CeilDiv<size_t>(layout.slots + moves * sizeof(int32_t), 256) * 256;
  return layout;
}

TRIMKV_DEVICE PlanScratch RowScratch(const PoolUpdateArgs& args, int32_t row) {
  const PlanLayout layout = LayOutPlan(args.shape, args.steps);
  char* base = static_cast<char*>(args.workspace) + layout.bytes * static_cast<size_t>(row);
  return {reinterpret_cast<PlanHeader*>(base),
          reinterpret_cast<uint32_t*>(base + layout.keys),
          reinterpret_cast<int32_t*>(base + layout.owner),
          reinterpret_cast<int32_t*>(base + layout.moving),
          reinterpret_cast<int32_t*>(base + layout.slots),
          reinterpret_cast<uint32_t*>(base + layout.threshold_keys),
          reinterpret_cast<uint64_t*>(base + layout.threshold_ties)};
}

// Shared memory of PlanRow: scan sums, and below them the histograms or the sorting table, never both at once.
inline constexpr int kPlanTableInts = 10240;
inline constexpr int kPlanSharedBytes = (kScanInts + kPlanTableInts) * static_cast<int>(sizeof(int32_t));
static_assert(HistogramInts(kBlockDigit) <= kPlanTableInts, "a block's histogram fits");
static_assert(kPlanThreads / kWarpSize * HistogramInts(kWarpDigit) <= kPlanTableInts, "a histogram for each warp fits");

// One batch row as PlanRow sees it.
struct RowView {
  int32_t row, streams, num_slots;
  int32_t seen;     // n, this step's tokens included
  int32_t fresh;    // valid tokens of this step
  int32_t recent;   // tokens that were recent before it
  int32_t outside;  // fresh + recent
  int32_t live;     // pool entries before it
  int32_t budget;   // entries per stream that an eviction keeps

  const int32_t* slot_index;    // [N]
  const int32_t* stream_start;  // [L·H + 1]
  const float* log_beta;        // [N]
  const int32_t* position;      // [N]

  TRIMKV_DEVICE int32_t entries() const { return outside * streams; }
  TRIMKV_DEVICE int32_t first_position() const { return seen - outside; }
};

TRIMKV_DEVICE RowView ViewRow(const PoolUpdateArgs& args, int32_t row) {
  const CacheShape& shape = args.shape;
  const int32_t* counters = args.counters + static_cast<int64_t>(row) * kNumCounters;
  const int64_t pool = static_cast<int64_t>(row) * shape.num_slots;
  RowView view;
  view.row = row;
  view.streams = shape.num_streams();
  view.num_slots = shape.num_slots;
  view.fresh = Clamp(args.step_tokens[row], 0, args.steps);
  view.seen = Clamp(counters[kTokensSeen], 0, INT32_MAX - args.steps) + view.fresh;
  view.recent = Clamp(counters[kRecentTokens], 0, shape.evict_every);
  view.outside = view.recent + view.fresh;
  view.slot_index = args.slot_index + pool;
  view.stream_start = args.stream_start + static_cast<int64_t>(row) * (view.streams + 1);
  view.log_beta = args.pool_log_beta + pool;
  view.position = args.pool_position + pool;
  view.live = Clamp(view.stream_start[view.streams], 0, shape.num_slots);
  view.budget = Clamp(args.budget[row], 0, shape.num_slots / view.streams);
  return view;
}

// Log-retention of entry `e` outside the pool.
TRIMKV_DEVICE float OutsideLogBeta(const PoolUpdateArgs& args, const RowView& view, int32_t e) {
  const int32_t token = e / view.streams;
  const int32_t stream = e % view.streams;
  if (token < view.recent) {
    const int64_t at = (static_cast<int64_t>(view.row) * view.streams + stream) * args.shape.evict_every + token;
    return args.recent_log_beta[at];
  }
  const int32_t heads = args.shape.num_kv_heads;
  const int64_t at = (static_cast<int64_t>(view.row) * args.steps + (token - view.recent)) * heads + stream % heads;
  return args.log_beta[stream / heads][at];
}

// owner[slot] from slot_index and stream_start. Ends with a barrier.
template <class Block>
TRIMKV_DEVICE void FindOwners(Block& block, const RowView& view, int32_t* owner) {
  for (int32_t slot = block.Thread(); slot < view.num_slots; slot += block.Threads()) owner[slot] = view.streams;
  block.Sync();
  const Range range = WarpRange(block, view.live, block.Warps());
  int32_t stream = 0;
  if (range.begin < range.end) {  // the last stream that starts at or before the range
    int32_t end = view.streams;
    while (end - stream > 1) {
      const int32_t middle = (stream + end) / 2;
      (view.stream_start[middle] <= range.begin ? stream : end) = middle;
    }
  }
  for (int32_t i = range.begin + block.Lane(); i < range.end; i += kWarpSize) {
    while (stream + 1 < view.streams && i >= view.stream_start[stream + 1]) ++stream;
    owner[Clamp(view.slot_index[i], 0, view.num_slots - 1)] = stream;
  }
  block.Sync();
}

// Keys of all entries, free slots included. Ends with a barrier.
template <class Block>
TRIMKV_DEVICE void ScoreEntries(Block& block, const PoolUpdateArgs& args, const RowView& view,
                                const PlanScratch& scratch) {
  const auto key = [&](float log_beta, int32_t position) {
    const uint32_t own = OrderedKey(RetentionScore(log_beta, position, view.seen, args.lookahead_steps));
    return own < kLowestKey ? kLowestKey : own > kHighestKey ? kHighestKey : own;
  };
  for (int32_t slot = block.Thread(); slot < view.num_slots; slot += block.Threads()) {
    const bool is_free = scratch.owner[slot] == view.streams;
    scratch.keys[slot] = is_free ? kNoKey : key(view.log_beta[slot], view.position[slot]);
  }
  uint32_t* outside = scratch.keys + view.num_slots;
  for (int32_t e = block.Thread(); e < view.entries(); e += block.Threads()) {
    outside[e] = key(OutsideLogBeta(args, view, e), view.first_position() + e / view.streams);
  }
  block.Sync();
}

// All entries of a row: its slots, then those outside the pool.
struct AllEntries {
  const RowView& view;
  const PlanScratch& scratch;

  TRIMKV_DEVICE int32_t Size() const { return view.num_slots + view.entries(); }
  TRIMKV_DEVICE uint32_t Key(int32_t i) const { return scratch.keys[i]; }
  TRIMKV_DEVICE uint64_t Tie(int32_t i) const {
    if (i < view.num_slots) return TieKey(view.position[i], scratch.owner[i]);
    const int32_t e = i - view.num_slots;
    return TieKey(view.first_position() + e / view.streams, e % view.streams);
  }
};

// The entries of one stream: its group of slot_index, then one for each token outside the pool.
struct StreamEntries {
  const RowView& view;
  const PlanScratch& scratch;
  int32_t stream, begin, pooled;

  TRIMKV_DEVICE StreamEntries(const RowView& view_in, const PlanScratch& scratch_in, int32_t stream_in)
      : view(view_in), scratch(scratch_in), stream(stream_in) {
    begin = Clamp(view.stream_start[stream], 0, view.num_slots);
    pooled = Clamp(view.stream_start[stream + 1], begin, view.num_slots) - begin;
  }
  TRIMKV_DEVICE int32_t Size() const { return pooled + view.outside; }
  TRIMKV_DEVICE uint32_t Key(int32_t i) const {
    if (i < pooled) return scratch.keys[Slot(i)];
    return scratch.keys[view.num_slots + (i - pooled) * view.streams + stream];
  }
  TRIMKV_DEVICE uint64_t Tie(int32_t i) const {
    const int32_t position = i < pooled ? view.position[Slot(i)] : view.first_position() + (i - pooled);
    return TieKey(position, stream);
  }
  TRIMKV_DEVICE int32_t Slot(int32_t i) const { return Clamp(view.slot_index[begin + i], 0, view.num_slots - 1); }
};

// Threshold of one stream, found by a warp or by the whole block; `won` is the threshold of the global competition that
// its quota comes from, if there was one.
template <int kDigit, class Group, class Block>
TRIMKV_DEVICE void RankStream(Group& group, Block& block, const PoolUpdateArgs& args, const RowView& view,
                              const PlanScratch& scratch, int32_t stream, const Threshold& won, int32_t* histogram) {
  const StreamEntries entries(view, scratch, stream);
  int32_t quota = view.budget;
  if (args.policy == Policy::kGlobal) {
    if (group.Rank() == 0) histogram[0] = 0;
    group.Sync();
    int32_t wins = 0;
    for (int32_t i = group.Rank(); i < entries.Size(); i += group.Size()) {
      const uint32_t key = entries.Key(i);
      wins += won.Admits(key, key == won.key ? entries.Tie(i) : 0);
    }
    if (wins != 0) block.AtomicAdd(&histogram[0], wins);
    group.Sync();
    quota = histogram[0] + args.min_tokens_per_head;
    group.Sync();
  }
  const Threshold best = BestThreshold<kDigit>(group, block, entries.Size(), entries.Size(), quota, histogram, entries);
  if (group.Rank() == 0) {
    scratch.threshold_keys[stream] = best.key;
    scratch.threshold_ties[stream] = best.tie;
  }
}

// Decides what stays: fills keys and the threshold of each stream. Ends with a barrier.
template <class Block>
TRIMKV_DEVICE void RankEntries(Block& block, const PoolUpdateArgs& args, const RowView& view,
                               const PlanScratch& scratch, int32_t* sums, int32_t* table) {
  ScoreEntries(block, args, view, scratch);
  BlockGroup<Block> everyone{block, sums};
  Threshold won = {~0u, ~0ull};
  if (args.policy == Policy::kGlobal) {
    const AllEntries entries{view, scratch};
    const int32_t places = view.streams * (view.budget - args.min_tokens_per_head);
    won =
        BestThreshold<kBlockDigit>(everyone, block, entries.Size(), view.live + view.entries(), places, table, entries);
    if (args.min_tokens_per_head == 0) {
      for (int32_t stream = block.Thread(); stream < view.streams; stream += block.Threads()) {
        scratch.threshold_keys[stream] = won.key;
        scratch.threshold_ties[stream] = won.tie;
      }
      block.Sync();
      return;
    }
  }

  const auto is_long = [&](int32_t stream) { return StreamEntries(view, scratch, stream).Size() > kWarpStreamEntries; };
  WarpGroup<Block> warp{block};
  int32_t* histogram = table + block.Warp() * HistogramInts(kWarpDigit);
  for (int32_t stream = block.Warp(); stream < view.streams; stream += block.Warps()) {
    if (!is_long(stream)) RankStream<kWarpDigit>(warp, block, args, view, scratch, stream, won, histogram);
  }
  block.Sync();
  for (int32_t stream = 0; stream < view.streams; ++stream) {
    if (is_long(stream)) RankStream<kBlockDigit>(everyone, block, args, view, scratch, stream, won, table);
  }
  block.Sync();
}

// Frees the slots of entries that leave and lists the entries outside that stay; returns how many. Ends with a barrier.
template <class Block>
TRIMKV_DEVICE int32_t ApplyRanking(Block& block, const RowView& view, const PlanScratch& scratch, int32_t max_moves,
                                   int32_t* sums) {
  const AllEntries entries{view, scratch};
  const auto stays = [&](int32_t i, int32_t stream) {
    const Threshold threshold = {scratch.threshold_keys[stream], scratch.threshold_ties[stream]};
    const uint32_t key = entries.Key(i);
    return threshold.Admits(key, key == threshold.key ? entries.Tie(i) : 0);
  };
  for (int32_t slot = block.Thread(); slot < view.num_slots; slot += block.Threads()) {
    const int32_t stream = scratch.owner[slot];
    if (stream < view.streams && !stays(slot, stream)) scratch.owner[slot] = view.streams;
  }
  const int32_t moves = Compact(
      block, view.entries(), max_moves, sums, [&](int32_t e) { return stays(view.num_slots + e, e % view.streams); },
      [&](int32_t rank, int32_t e) { scratch.moving[rank] = e; });
  block.Sync();
  return moves < max_moves ? moves : max_moves;
}

// Everything of one row but the keys and values. `shared` has kPlanSharedBytes.
template <class Block>
TRIMKV_DEVICE void PlanRow(Block& block, const PoolUpdateArgs& args, int32_t row, void* shared) {
  int32_t* sums = static_cast<int32_t*>(shared);
  int32_t* table = sums + kScanInts;
  const PlanScratch scratch = RowScratch(args, row);
  const RowView view = ViewRow(args, row);
  int32_t* counters = args.counters + static_cast<int64_t>(row) * kNumCounters;
  const int32_t evictions = Clamp(counters[kEvictions], 0, INT32_MAX - 1);
  block.Sync();  // all have read the counters that are rewritten below

  const int64_t total = view.live + static_cast<int64_t>(view.outside) * view.streams;
  const bool evict =
      view.fresh > 0 && total >= static_cast<int64_t>(view.streams) * (view.budget + args.shape.evict_every);
  const int32_t room = (view.num_slots - view.live) / view.streams;
  const int32_t moved_tokens = evict ? view.outside : view.fresh == 0 ? 0 : view.outside < room ? view.outside : room;

  int32_t moves = 0;
  if (moved_tokens > 0) {
    FindOwners(block, view, scratch.owner);
    if (evict) {
      RankEntries(block, args, view, scratch, sums, table);
      moves = ApplyRanking(block, view, scratch, LayOutPlan(args.shape, args.steps).max_moves, sums);
    } else {
      moves = moved_tokens * view.streams;
      for (int32_t i = block.Thread(); i < moves; i += block.Threads()) scratch.moving[i] = i;
      block.Sync();
    }
    const int32_t available = Compact(
        block, view.num_slots, moves, sums, [&](int32_t slot) { return scratch.owner[slot] == view.streams; },
        [&](int32_t rank, int32_t slot) { scratch.slots[rank] = slot; });
    if (moves > available) moves = available;  // cannot be, unless the state was damaged
    block.Sync();
    for (int32_t i = block.Thread(); i < moves; i += block.Threads()) {
      scratch.owner[scratch.slots[i]] = scratch.moving[i] % view.streams;
    }
    block.Sync();
    SortByBin(block, scratch.owner, view.num_slots, view.streams + 1,
              args.slot_index + static_cast<int64_t>(row) * view.num_slots,
              args.stream_start + static_cast<int64_t>(row) * (view.streams + 1), table, kPlanTableInts, sums);
    block.Sync();
  }
  if (block.Thread() != 0) return;

  // Only this step's tokens are ever written to recent, behind those that stay there.
  const int32_t rest = view.outside - moved_tokens;
  const int32_t place = moved_tokens > 0 ? 0 : view.recent;
  int32_t written = Clamp(rest - place, 0, args.shape.evict_every - place);
  if (written > view.fresh) written = view.fresh;
  *scratch.header = {moves, view.recent, view.first_position(), written, view.fresh - written, place, {}};
  if (view.fresh == 0) return;
  counters[kTokensSeen] = view.seen;
  if (moved_tokens > 0) counters[kPoolEntries] = view.stream_start[view.streams];
  counters[kRecentTokens] = Clamp(rest, 0, args.shape.evict_every);
  counters[kEvictions] = evictions + evict;
}

// Copies what PlanRow planned, `Vector` by `Vector`; called by every thread of every block of the row.
// `first` numbers the threads over all blocks of the row, of which there are `stride`.
template <class Vector>
TRIMKV_DEVICE void MoveRow(const PoolUpdateArgs& args, int32_t row, uint32_t first, uint32_t stride) {
  const PlanScratch scratch = RowScratch(args, row);
  const PlanHeader header = *scratch.header;
  const int32_t streams = args.shape.num_streams();
  const int32_t heads = args.shape.num_kv_heads;
  const int64_t bytes = static_cast<int64_t>(args.shape.head_dim) * (args.type == DataType::kFloat32 ? 4 : 2);
  const uint32_t vectors = static_cast<uint32_t>(bytes / static_cast<int64_t>(sizeof(Vector)));
  const int64_t recent_row = static_cast<int64_t>(row) * streams;
  const int64_t pool_row = static_cast<int64_t>(row) * args.shape.num_slots;
  const uint32_t items = static_cast<uint32_t>(header.moves + header.written * streams) * vectors;

  for (uint32_t item = first; item < items; item += stride) {
    const int32_t i = static_cast<int32_t>(item / vectors);
    const uint32_t v = item % vectors;
    const bool moves = i < header.moves;
    const int32_t e = moves ? scratch.moving[i] : i - header.moves;
    const int32_t stream = e % streams;
    const int32_t ahead = moves ? e / streams : header.recent + header.first_written + e / streams;

    // From: a token of recent, or of this step.
    const char *key, *value;
    float log_beta = 0.0f;
    if (ahead < header.recent) {
      const int64_t at = (recent_row + stream) * args.shape.evict_every + ahead;
      key = static_cast<const char*>(args.recent_key) + at * bytes;
      value = static_cast<const char*>(args.recent_value) + at * bytes;
      if (v == 0) log_beta = args.recent_log_beta[at];
    } else {
      const int32_t layer = stream / heads;
      const int64_t token = static_cast<int64_t>(row) * args.steps + (ahead - header.recent);
      const int64_t at = token * heads + stream % heads;
      key = static_cast<const char*>(args.key[layer]) + at * bytes;
      value = static_cast<const char*>(args.value[layer]) + at * bytes;
      if (v == 0) log_beta = args.log_beta[layer][at];
    }

    // To: a slot of the pool, or a place in recent.
    char *to_key, *to_value;
    if (moves) {
      const int64_t at = pool_row + scratch.slots[i];
      to_key = static_cast<char*>(args.pool_key) + at * bytes;
      to_value = static_cast<char*>(args.pool_value) + at * bytes;
      if (v == 0) {
        args.pool_log_beta[at] = log_beta;
        args.pool_position[at] = header.first_position + ahead;
      }
    } else {
      const int64_t at = (recent_row + stream) * args.shape.evict_every + header.place + e / streams;
      to_key = static_cast<char*>(args.recent_key) + at * bytes;
      to_value = static_cast<char*>(args.recent_value) + at * bytes;
      if (v == 0) args.recent_log_beta[at] = log_beta;
    }
    const Vector key_vector = reinterpret_cast<const Vector*>(key)[v];
    const Vector value_vector = reinterpret_cast<const Vector*>(value)[v];
    reinterpret_cast<Vector*>(to_key)[v] = key_vector;
    reinterpret_cast<Vector*>(to_value)[v] = value_vector;
  }
}

}  // namespace trimkv::cuda
