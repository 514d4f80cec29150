// Both operators written for reading, after trimkv_export/policy/cache.py: what kernels are tested against.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "trimkv/kernels.h"
#include "trimkv/scores.h"

namespace trimkv::test {

// State and step of a batch, with keys and values as floats. Sizes as in kernels.h.
struct Problem {
  CacheShape shape;
  Policy policy = Policy::kGlobal;
  int32_t group = 1, steps = 1, min_tokens = 0, lookahead = 1;
  std::vector<float> pool_key, pool_value, pool_log_beta, recent_key, recent_value, recent_log_beta;
  std::vector<int32_t> pool_position, slot_index, stream_start, counters, step_tokens, budget;
  std::vector<std::vector<float>> query, key, value, log_beta;  // per layer

  explicit Problem(const CacheShape& s) : shape(s) {
    const size_t rows = s.batch, slots = s.num_slots, dim = s.head_dim, recent = rows * s.num_streams() * s.evict_every;
    pool_key.resize(rows * slots * dim);
    pool_value = pool_key;
    pool_log_beta.resize(rows * slots);
    recent_key.resize(recent * dim);
    recent_value = recent_key;
    recent_log_beta.resize(recent);
    pool_position.resize(rows * slots);
    slot_index.resize(rows * slots);
    stream_start.resize(rows * (s.num_streams() + 1));
    counters.resize(rows * kNumCounters);
    step_tokens.assign(rows, 1);
    budget.assign(rows, s.num_slots / s.num_streams());
  }

  void Reset(int32_t row) {
    std::fill_n(counters.begin() + row * kNumCounters, static_cast<int>(kNumCounters), 0);
    std::fill_n(stream_start.begin() + row * (shape.num_streams() + 1), shape.num_streams() + 1, 0);
  }

  // New keys, values and gates for a step of `s` tokens. `levels` > 0 draws log_beta from so few values that scores
  // tie.
  template <typename Random>
  void NewStep(Random& random, int32_t s, int levels) {
    steps = s;
    const size_t entries = static_cast<size_t>(shape.batch) * s * shape.num_kv_heads;
    std::normal_distribution<float> normal;
    const auto fill = [&](size_t count) {
      std::vector<float> out(count);
      for (float& x : out) x = normal(random);
      return out;
    };
    query.clear(), key.clear(), value.clear(), log_beta.clear();
    for (int32_t layer = 0; layer < shape.num_layers; ++layer) {
      query.push_back(fill(entries * group * shape.head_dim));
      key.push_back(fill(entries * shape.head_dim));
      value.push_back(fill(entries * shape.head_dim));
      log_beta.push_back(fill(entries));
      for (float& x : log_beta.back()) x = levels ? -std::floor(std::fabs(x) * levels) : -std::exp(3 * x - 3);
    }
  }
};

// What PoolAttention must give for one query.
inline std::vector<double> AttendOne(const Problem& p, int32_t layer, int32_t row, int32_t token, int32_t query_head,
                                     float scale) {
  const CacheShape& s = p.shape;
  const int32_t head = query_head / p.group, stream = layer * s.num_kv_heads + head, dim = s.head_dim;
  const int32_t recent = p.counters[row * kNumCounters + kRecentTokens];
  const int32_t* start = &p.stream_start[row * (s.num_streams() + 1) + stream];
  const size_t slots = static_cast<size_t>(row) * s.num_slots;
  std::vector<const float*> keys, values;
  for (int32_t i = start[0]; i < start[1]; ++i) {
    const size_t slot = slots + p.slot_index[slots + i];
    keys.push_back(&p.pool_key[slot * dim]), values.push_back(&p.pool_value[slot * dim]);
  }
  for (int32_t i = 0; i < recent; ++i) {
    const size_t at = (static_cast<size_t>(row) * s.num_streams() + stream) * s.evict_every + i;
    keys.push_back(&p.recent_key[at * dim]), values.push_back(&p.recent_value[at * dim]);
  }
  for (int32_t i = 0; i <= token; ++i) {
    const size_t at = (static_cast<size_t>(row) * p.steps + i) * s.num_kv_heads + head;
    keys.push_back(&p.key[layer][at * dim]), values.push_back(&p.value[layer][at * dim]);
  }
  const size_t q = (static_cast<size_t>(row) * p.steps + token) * s.num_kv_heads * p.group + query_head;
  std::vector<double> logits, out(dim);
  for (const float* k : keys) {
    double dot = 0;
    for (int32_t d = 0; d < dim; ++d) dot += static_cast<double>(p.query[layer][q * dim + d]) * k[d];
    logits.push_back(dot * scale);
  }
  const double highest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double& logit : logits) sum += logit = std::exp(logit - highest);
  for (size_t i = 0; i < keys.size(); ++i) {
    for (int32_t d = 0; d < dim; ++d) out[d] += logits[i] / sum * values[i][d];
  }
  return out;
}

// PoolUpdate of one row, in place.
inline void UpdateRow(Problem& p, int32_t row) {
  const CacheShape& s = p.shape;
  const int32_t added = p.step_tokens[row], streams = s.num_streams(), heads = s.num_kv_heads, dim = s.head_dim;
  if (added == 0) return;
  int32_t* counters = &p.counters[row * kNumCounters];
  int32_t* start = &p.stream_start[row * (streams + 1)];
  const size_t slots = static_cast<size_t>(row) * s.num_slots;
  const int32_t recent = counters[kRecentTokens], outside = recent + added, seen = counters[kTokensSeen] + added;
  const int32_t budget = p.budget[row];

  struct Entry {
    float log_beta;
    int32_t position, stream, slot;  // slot < 0: outside the pool
    const float *key, *value;
    bool keep = true;
  };
  std::vector<Entry> entries;
  for (int32_t stream = 0; stream < streams; ++stream) {
    for (int32_t i = start[stream]; i < start[stream + 1]; ++i) {
      const int32_t slot = p.slot_index[slots + i];
      entries.push_back({p.pool_log_beta[slots + slot], p.pool_position[slots + slot], stream, slot, nullptr, nullptr});
    }
  }
  const size_t live = entries.size();
  const std::vector<float> old_key = p.recent_key, old_value = p.recent_value, old_log_beta = p.recent_log_beta;
  for (int32_t token = 0; token < outside; ++token) {
    for (int32_t stream = 0; stream < streams; ++stream) {
      const int32_t layer = stream / heads, head = stream % heads;
      const size_t old = (static_cast<size_t>(row) * streams + stream) * s.evict_every + token;
      const size_t fresh = (static_cast<size_t>(row) * p.steps + token - recent) * heads + head;
      const bool is_old = token < recent;
      entries.push_back({is_old ? old_log_beta[old] : p.log_beta[layer][fresh], seen - outside + token, stream, -1,
                         is_old ? &old_key[old * dim] : &p.key[layer][fresh * dim],
                         is_old ? &old_value[old * dim] : &p.value[layer][fresh * dim]});
    }
  }
  int32_t moved = outside;
  if (static_cast<int64_t>(entries.size()) >= static_cast<int64_t>(streams) * (budget + s.evict_every)) {
    std::vector<size_t> order(entries.size());
    std::iota(order.begin(), order.end(), 0);
    std::vector<float> score(entries.size());
    for (size_t i = 0; i < entries.size(); ++i) {
      score[i] = RetentionScore(entries[i].log_beta, entries[i].position, seen, p.lookahead);
    }
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      if (score[a] != score[b]) return score[a] > score[b];
      if (entries[a].position != entries[b].position) return entries[a].position > entries[b].position;
      return entries[a].stream < entries[b].stream;
    });
    std::vector<int32_t> quota(streams, p.policy == Policy::kPerHead ? budget : p.min_tokens);
    int64_t winners = p.policy == Policy::kPerHead ? 0 : static_cast<int64_t>(streams) * (budget - p.min_tokens);
    for (size_t i : order) {
      if (winners-- > 0) ++quota[entries[i].stream];
    }
    for (size_t i : order) entries[i].keep = quota[entries[i].stream]-- > 0;
    ++counters[kEvictions];
  } else {
    moved = std::min<int32_t>(outside, (s.num_slots - static_cast<int32_t>(live)) / streams);
    for (size_t i = live + static_cast<size_t>(moved) * streams; i < entries.size(); ++i) entries[i].keep = false;
  }
  std::vector<int32_t> owner(s.num_slots, streams);
  for (size_t i = 0; i < live; ++i) {
    if (entries[i].keep) owner[entries[i].slot] = entries[i].stream;
  }
  int32_t slot = 0;
  for (size_t i = live; i < entries.size(); ++i) {
    if (!entries[i].keep) continue;
    while (owner[slot] != streams) ++slot;
    owner[slot] = entries[i].stream;
    p.pool_log_beta[slots + slot] = entries[i].log_beta;
    p.pool_position[slots + slot] = entries[i].position;
    std::copy_n(entries[i].key, dim, &p.pool_key[(slots + slot) * dim]);
    std::copy_n(entries[i].value, dim, &p.pool_value[(slots + slot) * dim]);
  }
  int32_t at = 0;
  for (int32_t stream = 0; stream <= streams; ++stream) {
    start[stream] = at;
    for (int32_t i = 0; i < s.num_slots; ++i) {
      if (owner[i] == stream) p.slot_index[slots + at++] = i;
    }
  }
  for (size_t i = live + static_cast<size_t>(moved) * streams; i < entries.size(); ++i) {
    const int32_t token = static_cast<int32_t>((i - live) / streams) - moved;
    const size_t to = (static_cast<size_t>(row) * streams + entries[i].stream) * s.evict_every + token;
    p.recent_log_beta[to] = entries[i].log_beta;
    std::copy_n(entries[i].key, dim, &p.recent_key[to * dim]);
    std::copy_n(entries[i].value, dim, &p.recent_value[to * dim]);
  }
  counters[kTokensSeen] = seen;
  counters[kPoolEntries] = start[streams];
  counters[kRecentTokens] = outside - moved;
}

}  // namespace trimkv::test
