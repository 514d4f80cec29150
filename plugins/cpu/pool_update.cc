// PoolUpdate on the CPU. The readable specification is trimkv_export/policy/cache.py; the state that results is the
// same slot by slot.
#include "cpu/pool_update.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "trimkv/scores.h"

namespace trimkv::cpu {
namespace {

constexpr size_t kAlignment = 64;

// Hands out pieces of the workspace; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* Take(size_t count) {
    const size_t at = used_;
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// An entry outside the pool on its way in.
struct Move {
  int32_t token;  // index among the tokens outside the pool: recent, then new
  int32_t stream;
  int32_t slot;
};

// Candidates are the live pool entries in slot_index order, then entries outside the pool, token by token and stream
// by stream. The arrays are as long as there can be candidates.
struct Workspace {
  uint32_t* key;      // ordered score
  int32_t* position;  // token position
  int32_t* stream;
  uint8_t* keep;
  uint32_t* order;    // candidates of a selection
  uint32_t* scratch;  // their keys
  int32_t* owner;     // [N]: stream of each slot, L·H where free
  int32_t* start;     // [L·H + 2]: scratch of the rebuild
  int32_t* quota;     // [L·H]
  int32_t* first;     // [L·H + 1]: where each stream's candidates start in `order`
  Move* moves;        // [N]

  Workspace(const PoolUpdateArgs& args, Arena& arena) {
    const auto& shape = args.shape;
    const size_t streams = shape.num_streams(), slots = shape.num_slots;
    const size_t candidates = slots + streams * (static_cast<size_t>(shape.evict_every) + args.steps);
    key = arena.Take<uint32_t>(candidates);
    position = arena.Take<int32_t>(candidates);
    stream = arena.Take<int32_t>(candidates);
    keep = arena.Take<uint8_t>(candidates);
    order = arena.Take<uint32_t>(candidates);
    scratch = arena.Take<uint32_t>(candidates);
    owner = arena.Take<int32_t>(slots);
    start = arena.Take<int32_t>(streams + 2);
    quota = arena.Take<int32_t>(streams);
    first = arena.Take<int32_t>(streams + 1);
    moves = arena.Take<Move>(slots);
  }
};

// One row of the batch, while it is updated.
class Row {
 public:
  Row(const PoolUpdateArgs& args, int32_t row, const Workspace& work, const Parallel& parallel)
      : args_(args),
        shape_(args.shape),
        work_(work),
        parallel_(parallel),
        row_(row),
        streams_(args.shape.num_streams()),
        row_bytes_(args.shape.head_dim * ItemSize(args.type)),
        counters_(args.counters + row * kNumCounters),
        slot_index_(args.slot_index + static_cast<size_t>(row) * args.shape.num_slots),
        stream_start_(args.stream_start + static_cast<size_t>(row) * (args.shape.num_streams() + 1)) {}

  void Run() {
    const int32_t added = args_.step_tokens[row_];
    if (added <= 0) return;
    recent_ = counters_[kRecentTokens];
    live_ = counters_[kPoolEntries];
    outside_ = recent_ + added;
    seen_ = counters_[kTokensSeen] + added;
    const int64_t budget = args_.budget[row_];
    const int64_t total = live_ + static_cast<int64_t>(streams_) * outside_;
    const bool evict = total >= streams_ * (budget + shape_.evict_every);

    int32_t moved_tokens;
    if (evict) {
      moved_tokens = outside_;
      Select(static_cast<int32_t>(budget));
    } else {
      moved_tokens = std::min(outside_, (shape_.num_slots - live_) / streams_);
    }
    if (moved_tokens > 0) MoveIn(evict, moved_tokens);

    // Tokens move only when nothing was recent before, or all leave; so what is written are always the step's own.
    const int32_t still = moved_tokens > 0 ? 0 : recent_;
    const int32_t rest = outside_ - moved_tokens;
    AppendRecent(still, rest - still, added);
    counters_[kTokensSeen] = seen_;
    counters_[kPoolEntries] = stream_start_[streams_];
    counters_[kRecentTokens] = rest;
    counters_[kEvictions] += evict;
  }

 private:
  size_t num_candidates() const { return live_ + static_cast<size_t>(streams_) * outside_; }

  // Where the entry of (token outside the pool, stream) lies now.
  template <typename T>
  const T* Outside(const T* recent, const void* const* fresh, int32_t token, int32_t stream, size_t width) const {
    if (token < recent_) {
      const size_t place = (static_cast<size_t>(row_) * streams_ + stream) * shape_.evict_every + token;
      return recent + place * width;
    }
    const int32_t layer = stream / shape_.num_kv_heads, head = stream % shape_.num_kv_heads;
    const size_t place = (static_cast<size_t>(row_) * args_.steps + (token - recent_)) * shape_.num_kv_heads + head;
    return static_cast<const T*>(fresh[layer]) + place * width;
  }
  float OutsideLogBeta(int32_t token, int32_t stream) const {
    return *Outside(args_.recent_log_beta, reinterpret_cast<const void* const*>(args_.log_beta), token, stream, 1);
  }
  int32_t OutsidePosition(int32_t token) const { return seen_ - outside_ + token; }

  // Fills `keep` for every candidate.
  void Select(int32_t budget) {
    Score();
    std::memset(work_.keep, 0, num_candidates());
    const int32_t minimum = args_.min_tokens_per_head;
    if (args_.policy == Policy::kGlobal) {
      for (size_t i = 0; i < num_candidates(); ++i) work_.order[i] = static_cast<uint32_t>(i);
      KeepBest(0, static_cast<int32_t>(num_candidates()), static_cast<int64_t>(streams_) * (budget - minimum));
      if (minimum == 0) return;
      std::fill_n(work_.quota, streams_, minimum);
      for (size_t i = 0; i < num_candidates(); ++i) work_.quota[work_.stream[i]] += work_.keep[i];
    } else {
      std::fill_n(work_.quota, streams_, budget);
    }
    GroupByStream();
    parallel_.For(streams_, [this](size_t stream) {
      KeepBest(work_.first[stream], work_.first[stream + 1], work_.quota[stream]);
    });
  }

  void Score() {
    const size_t base = static_cast<size_t>(row_) * shape_.num_slots;
    parallel_.For(streams_, [this, base](size_t stream) {
      for (int32_t i = stream_start_[stream]; i < stream_start_[stream + 1]; ++i) {
        const int32_t slot = slot_index_[i];
        const int32_t position = args_.pool_position[base + slot];
        SetCandidate(i, args_.pool_log_beta[base + slot], position, static_cast<int32_t>(stream));
      }
    });
    parallel_.For(outside_, [this](size_t token) {
      const int32_t position = OutsidePosition(static_cast<int32_t>(token));
      for (int32_t stream = 0; stream < streams_; ++stream) {
        const float log_beta = OutsideLogBeta(static_cast<int32_t>(token), stream);
        SetCandidate(live_ + token * streams_ + stream, log_beta, position, stream);
      }
    });
  }
  void SetCandidate(size_t index, float log_beta, int32_t position, int32_t stream) {
    work_.key[index] = OrderedKey(RetentionScore(log_beta, position, seen_, args_.lookahead_steps));
    work_.position[index] = position;
    work_.stream[index] = stream;
  }

  // Keeps the `count` best of the candidates order[begin, end), which are permuted. `scratch` has as many elements.
  void KeepBest(int32_t begin, int32_t end, int64_t count) {
    if (count <= 0) return;
    uint32_t* const order = work_.order;
    if (count >= end - begin) {
      for (int32_t i = begin; i < end; ++i) work_.keep[order[i]] = 1;
      return;
    }
    // The last key that stays; then all above it, and of its equals the best.
    uint32_t* const keys = work_.scratch + begin;
    for (int32_t i = begin; i < end; ++i) work_.scratch[i] = work_.key[order[i]];
    std::nth_element(keys, keys + count - 1, keys + (end - begin), std::greater<>());
    const uint32_t last = keys[count - 1];
    int32_t ties = begin;  // candidates of that key are collected at the front
    for (int32_t i = begin; i < end; ++i) {
      const uint32_t candidate = order[i];
      if (work_.key[candidate] > last) {
        work_.keep[candidate] = 1;
        --count;
      } else if (work_.key[candidate] == last) {
        order[i] = order[ties];
        order[ties++] = candidate;
      }
    }
    std::nth_element(order + begin, order + begin + count - 1, order + ties, [this](uint32_t a, uint32_t b) {
      return TieKey(work_.position[a], work_.stream[a]) > TieKey(work_.position[b], work_.stream[b]);
    });
    for (int32_t i = begin; i < begin + count; ++i) work_.keep[order[i]] = 1;
  }

  // Candidates in `order`, stream by stream.
  void GroupByStream() {
    int32_t* first = work_.first;
    std::fill_n(first, streams_ + 1, 0);
    for (size_t i = 0; i < num_candidates(); ++i) ++first[work_.stream[i] + 1];
    for (int32_t stream = 0; stream < streams_; ++stream) first[stream + 1] += first[stream];
    int32_t* next = work_.start;
    std::copy_n(first, streams_, next);
    for (size_t i = 0; i < num_candidates(); ++i) work_.order[next[work_.stream[i]]++] = static_cast<uint32_t>(i);
  }

  // Brings entries into the pool: all that were chosen, or without an eviction the oldest `moved_tokens` tokens.
  void MoveIn(bool evict, int32_t moved_tokens) {
    std::fill_n(work_.owner, shape_.num_slots, streams_);
    for (int32_t stream = 0; stream < streams_; ++stream) {
      for (int32_t i = stream_start_[stream]; i < stream_start_[stream + 1]; ++i) {
        if (!evict || work_.keep[i]) work_.owner[slot_index_[i]] = stream;
      }
    }
    int32_t count = 0, slot = 0;
    for (int32_t token = 0; token < moved_tokens; ++token) {
      for (int32_t stream = 0; stream < streams_; ++stream) {
        if (evict && !work_.keep[live_ + static_cast<size_t>(token) * streams_ + stream]) continue;
        while (work_.owner[slot] != streams_) ++slot;
        work_.owner[slot] = stream;
        work_.moves[count++] = {token, stream, slot};
      }
    }
    constexpr size_t kBlock = 64;  // rows for one task
    parallel_.For((count + kBlock - 1) / kBlock, [this, count](size_t block) {
      const size_t end = std::min<size_t>(count, (block + 1) * kBlock);
      for (size_t i = block * kBlock; i < end; ++i) CopyIn(work_.moves[i]);
    });
    RebuildIndex();
  }

  void CopyIn(const Move& move) {
    const size_t place = static_cast<size_t>(row_) * shape_.num_slots + move.slot;
    const auto copy = [&](void* pool, const void* recent, const void* const* fresh) {
      std::memcpy(static_cast<char*>(pool) + place * row_bytes_,
                  Outside(static_cast<const char*>(recent), fresh, move.token, move.stream, row_bytes_), row_bytes_);
    };
    copy(args_.pool_key, args_.recent_key, args_.key);
    copy(args_.pool_value, args_.recent_value, args_.value);
    args_.pool_log_beta[place] = OutsideLogBeta(move.token, move.stream);
    args_.pool_position[place] = OutsidePosition(move.token);
  }

  // slot_index and stream_start from `owner`: by stream, ascending within a stream, free slots last.
  void RebuildIndex() {
    int32_t* next = work_.start;
    std::fill_n(next, streams_ + 2, 0);
    for (int32_t slot = 0; slot < shape_.num_slots; ++slot) ++next[work_.owner[slot] + 1];
    for (int32_t stream = 0; stream <= streams_; ++stream) next[stream + 1] += next[stream];
    std::copy_n(next, streams_ + 1, stream_start_);
    for (int32_t slot = 0; slot < shape_.num_slots; ++slot) slot_index_[next[work_.owner[slot]]++] = slot;
  }

  // Writes the last `written` tokens of the step behind the `still` recent ones.
  void AppendRecent(int32_t still, int32_t written, int32_t added) {
    if (written == 0) return;
    const int32_t heads = shape_.num_kv_heads, source = added - written;
    for (int32_t stream = 0; stream < streams_; ++stream) {
      const int32_t layer = stream / heads, head = stream % heads;
      for (int32_t i = 0; i < written; ++i) {
        const size_t from = (static_cast<size_t>(row_) * args_.steps + source + i) * heads + head;
        const size_t to = (static_cast<size_t>(row_) * streams_ + stream) * shape_.evict_every + still + i;
        std::memcpy(static_cast<char*>(args_.recent_key) + to * row_bytes_,
                    static_cast<const char*>(args_.key[layer]) + from * row_bytes_, row_bytes_);
        std::memcpy(static_cast<char*>(args_.recent_value) + to * row_bytes_,
                    static_cast<const char*>(args_.value[layer]) + from * row_bytes_, row_bytes_);
        args_.recent_log_beta[to] = args_.log_beta[layer][from];
      }
    }
  }

  const PoolUpdateArgs& args_;
  const CacheShape& shape_;
  const Workspace& work_;
  const Parallel& parallel_;
  const int32_t row_, streams_;
  const size_t row_bytes_;
  int32_t* const counters_;
  int32_t* const slot_index_;
  int32_t* const stream_start_;
  int32_t recent_ = 0, live_ = 0, outside_ = 0, seen_ = 0;
};

}  // namespace

size_t PoolUpdateWorkspaceBytes(const PoolUpdateArgs& args) {
  Arena arena(nullptr);
  Workspace(args, arena);
  return arena.used();
}

void PoolUpdate(const PoolUpdateArgs& args, const Parallel& parallel) {
  Arena arena(args.workspace);
  const Workspace work(args, arena);
  for (int32_t row = 0; row < args.shape.batch; ++row) Row(args, row, work, parallel).Run();
}

}  // namespace trimkv::cpu
