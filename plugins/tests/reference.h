// Both operators written for reading, after trimkv_export/policy/cache.py: what kernels are tested against.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "state.h"
#include "trimkv/scores.h"

namespace trimkv::test {

// PoolAttention of one layer in double: [B, S, H·G, D].
inline std::vector<float> ReferenceAttention(const Config& config, const State& state, const Step& step,
                                             int32_t layer) {
  const CacheShape& s = config.shape;
  const int64_t depth = s.head_dim, heads = s.num_kv_heads, group = config.group, streams = s.num_streams();
  std::vector<float> attended(static_cast<size_t>(s.batch) * step.steps * heads * group * depth, 0.0f);
  const auto row = [&](const Bytes& rows, int64_t at) {
    return Load(&rows[at * config.row_bytes()], depth, config.type);
  };
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t stream = layer * heads + head;
      // What the head's last token sees: pool, recent, this step's.
      std::vector<std::vector<float>> keys, values;
      const auto add = [&](const Bytes& key, const Bytes& value, int64_t at) {
        keys.push_back(row(key, at));
        values.push_back(row(value, at));
      };
      const int32_t* start = &state.stream_start[b * (streams + 1) + stream];
      for (int64_t i = start[0]; i < start[1]; ++i) {
        add(state.pool_key, state.pool_value, b * s.num_slots + state.slot_index[b * s.num_slots + i]);
      }
      for (int64_t i = 0; i < state.counter(b, kRecentTokens); ++i) {
        add(state.recent_key, state.recent_value, (b * streams + stream) * s.evict_every + i);
      }
      const size_t cached = keys.size();
      for (int64_t i = 0; i < step.step_tokens[b]; ++i) {
        add(step.key[layer], step.value[layer], (b * step.steps + i) * heads + head);
      }
      for (int64_t i = 0; i < step.step_tokens[b] * group; ++i) {
        const int64_t token = i / group, at = ((b * step.steps + token) * heads + head) * group + i % group;
        const std::vector<float> query = row(step.query[layer], at);
        std::vector<double> logits(cached + token + 1), total(depth, 0.0);
        for (size_t e = 0; e < logits.size(); ++e) {
          for (int64_t d = 0; d < depth; ++d) logits[e] += static_cast<double>(query[d]) * keys[e][d];
          logits[e] *= config.scale();
        }
        const double most = *std::max_element(logits.begin(), logits.end());
        double sum = 0.0;
        for (size_t e = 0; e < logits.size(); ++e) {
          const double weight = std::exp(logits[e] - most);
          sum += weight;
          for (int64_t d = 0; d < depth; ++d) total[d] += weight * values[e][d];
        }
        for (int64_t d = 0; d < depth; ++d) attended[at * depth + d] = static_cast<float>(total[d] / sum);
      }
    }
  }
  return attended;
}

// An entry that takes part in an update.
struct Entry {
  float log_beta;
  int32_t position, stream;
  int32_t slot;                // -1: outside the pool
  const uint8_t *key, *value;  // of those outside
  bool keep;
};

// Which entries an eviction keeps: docs/design.md, section 3.
inline void ReferenceSelect(const Config& config, int32_t budget, int32_t seen, std::vector<Entry>& entries) {
  const int32_t streams = config.shape.num_streams();
  std::vector<float> score(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    score[i] = RetentionScore(entries[i].log_beta, entries[i].position, seen, config.lookahead_steps);
  }
  std::vector<size_t> order(entries.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](size_t x, size_t y) {
    if (score[x] != score[y]) return score[x] > score[y];
    if (entries[x].position != entries[y].position) return entries[x].position > entries[y].position;
    return entries[x].stream < entries[y].stream;
  });
  std::vector<int32_t> quota(streams, budget);
  if (config.policy == Policy::kGlobal) {
    quota.assign(streams, config.min_tokens_per_head);
    const int64_t winners = static_cast<int64_t>(streams) * (budget - config.min_tokens_per_head);
    for (int64_t i = 0; i < winners; ++i) ++quota[entries[order[i]].stream];
  }
  for (const size_t i : order) entries[i].keep = quota[entries[i].stream]-- > 0;
}

// PoolUpdate of one row, in place.
inline void ReferenceUpdateRow(const Config& config, State& state, const Step& step, int64_t b) {
  const CacheShape& s = config.shape;
  const int32_t streams = s.num_streams(), fresh = step.step_tokens[b];
  if (fresh == 0) return;
  const size_t row = config.row_bytes();
  const int64_t pool = b * s.num_slots;
  int32_t* counters = &state.counters[b * kNumCounters];
  int32_t* start = &state.stream_start[b * (streams + 1)];
  const int32_t recent = counters[kRecentTokens], outside = recent + fresh, seen = counters[kTokensSeen] + fresh;

  // Entries of the pool, then those outside, token by token and stream by stream.
  std::vector<Entry> entries;
  for (int32_t stream = 0; stream < streams; ++stream) {
    for (int32_t i = start[stream]; i < start[stream + 1]; ++i) {
      const int32_t slot = state.slot_index[pool + i];
      entries.push_back(
          {state.pool_log_beta[pool + slot], state.pool_position[pool + slot], stream, slot, nullptr, nullptr, true});
    }
  }
  const size_t live = entries.size();
  // Recent tokens are read while recent is rewritten.
  const int64_t near = int64_t{streams} * s.evict_every;
  const Bytes recent_key(&state.recent_key[b * near * row], &state.recent_key[b * near * row] + near * row);
  const Bytes recent_value(&state.recent_value[b * near * row], &state.recent_value[b * near * row] + near * row);
  for (int32_t token = 0; token < outside; ++token) {
    for (int32_t stream = 0; stream < streams; ++stream) {
      const int32_t layer = stream / s.num_kv_heads, position = seen - outside + token;
      if (token < recent) {
        const int64_t at = stream * s.evict_every + token;
        entries.push_back({state.recent_log_beta[b * near + at], position, stream, -1, &recent_key[at * row],
                           &recent_value[at * row], true});
      } else {
        const int64_t at = (b * step.steps + token - recent) * s.num_kv_heads + stream % s.num_kv_heads;
        entries.push_back({step.log_beta[layer][at], position, stream, -1, &step.key[layer][at * row],
                           &step.value[layer][at * row], true});
      }
    }
  }

  // Who stays, and how many of the tokens outside enter the pool.
  int32_t moved_tokens = outside;
  if (static_cast<int64_t>(entries.size()) >= static_cast<int64_t>(streams) * (step.budget[b] + s.evict_every)) {
    ReferenceSelect(config, step.budget[b], seen, entries);
    ++counters[kEvictions];
  } else {
    moved_tokens = std::min<int32_t>(outside, (s.num_slots - static_cast<int32_t>(live)) / streams);
  }
  const size_t last = live + static_cast<size_t>(moved_tokens) * streams;  // entries from here on are recent

  // Into the free slots, in order.
  std::vector<int32_t> owner(s.num_slots, streams);
  for (size_t i = 0; i < live; ++i) {
    if (entries[i].keep) owner[entries[i].slot] = entries[i].stream;
  }
  int32_t slot = 0;
  for (size_t i = live; i < last; ++i) {
    const Entry& entry = entries[i];
    if (!entry.keep) continue;
    while (owner[slot] != streams) ++slot;
    owner[slot] = entry.stream;
    std::copy_n(entry.key, row, &state.pool_key[(pool + slot) * row]);
    std::copy_n(entry.value, row, &state.pool_value[(pool + slot) * row]);
    state.pool_log_beta[pool + slot] = entry.log_beta;
    state.pool_position[pool + slot] = entry.position;
  }
  std::vector<int32_t> order(s.num_slots);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) { return owner[x] < owner[y]; });
  std::copy(order.begin(), order.end(), &state.slot_index[pool]);
  for (int32_t stream = 0; stream <= streams; ++stream) {
    start[stream] =
        static_cast<int32_t>(std::count_if(owner.begin(), owner.end(), [&](int32_t of) { return of < stream; }));
  }

  for (size_t i = last; i < entries.size(); ++i) {
    const int64_t token = static_cast<int64_t>(i - last) / streams;
    const int64_t at = (b * streams + entries[i].stream) * s.evict_every + token;
    std::copy_n(entries[i].key, row, &state.recent_key[at * row]);
    std::copy_n(entries[i].value, row, &state.recent_value[at * row]);
    state.recent_log_beta[at] = entries[i].log_beta;
  }
  counters[kTokensSeen] = seen;
  counters[kPoolEntries] = start[streams];
  counters[kRecentTokens] = outside - moved_tokens;
}

inline void ReferenceUpdate(const Config& config, State& state, const Step& step) {
  for (int32_t b = 0; b < config.shape.batch; ++b) ReferenceUpdateRow(config, state, step, b);
}

}  // namespace trimkv::test
