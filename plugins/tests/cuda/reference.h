// Slow host references of both operators, written from trimkv_export/policy/cache.py, and random states to try them on.
// Shared by the emulated test (no GPU) and the GPU test.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "scalar.h"
#include "trimkv/kernels.h"
#include "trimkv/scores.h"

namespace trimkv::cuda {

struct Config {
  const char* name = "";
  CacheShape shape = {1, 2, 2, 8, 16, 2};
  int32_t group = 2;
  int32_t max_steps = 4;  // S
  Policy policy = Policy::kGlobal;
  int32_t min_tokens_per_head = 0;
  int32_t lookahead_steps = 1;
  int32_t budget = 0;  // entries per stream, 0: what the pool was built for
  DataType type = DataType::kFloat32;
  enum Retention { kRandom, kEqual, kOneStream, kFew } retention = kRandom;

  int32_t kept() const { return budget > 0 ? budget : shape.num_slots / shape.num_streams(); }
};

// The ten state tensors of all rows; keys and values as raw bytes.
struct State {
  std::vector<uint8_t> pool_key, pool_value, recent_key, recent_value;
  std::vector<float> pool_log_beta, recent_log_beta;
  std::vector<int32_t> pool_position, slot_index, stream_start, counters;

  explicit State(const Config& config) {
    const CacheShape& s = config.shape;
    const size_t row = s.head_dim * ItemSize(config.type);
    const size_t pool = static_cast<size_t>(s.batch) * s.num_slots;
    const size_t recent = static_cast<size_t>(s.batch) * s.num_streams() * s.evict_every;
    pool_key.resize(pool * row);
    pool_value.resize(pool * row);
    recent_key.resize(recent * row);
    recent_value.resize(recent * row);
    pool_log_beta.resize(pool);
    recent_log_beta.resize(recent);
    pool_position.resize(pool);
    slot_index.resize(pool);
    stream_start.resize(static_cast<size_t>(s.batch) * (s.num_streams() + 1));
    counters.resize(static_cast<size_t>(s.batch) * kNumCounters);
  }

  void Reset(const Config& config, int32_t row) {
    const int32_t starts = config.shape.num_streams() + 1;
    std::fill_n(stream_start.begin() + static_cast<int64_t>(row) * starts, starts, 0);
    std::fill_n(counters.begin() + static_cast<int64_t>(row) * kNumCounters, kNumCounters, 0);
  }

  // Name of the first tensor that differs, null if none.
  const char* Difference(const State& other) const {
    if (counters != other.counters) return "counters";
    if (stream_start != other.stream_start) return "stream_start";
    if (slot_index != other.slot_index) return "slot_index";
    if (pool_position != other.pool_position) return "pool_position";
    if (std::memcmp(pool_log_beta.data(), other.pool_log_beta.data(), pool_log_beta.size() * 4)) return "pool_log_beta";
    if (pool_key != other.pool_key) return "pool_key";
    if (pool_value != other.pool_value) return "pool_value";
    if (recent_key != other.recent_key) return "recent_key";
    if (recent_value != other.recent_value) return "recent_value";
    if (std::memcmp(recent_log_beta.data(), other.recent_log_beta.data(), recent_log_beta.size() * 4)) {
      return "recent_log_beta";
    }
    return nullptr;
  }
};

// What one step brings, per layer.
struct Step {
  std::vector<int32_t> step_tokens, budget;
  std::vector<std::vector<uint8_t>> query, key, value;  // per layer
  std::vector<std::vector<float>> log_beta;             // per layer [B, S, H]
};

inline void FillRandom(std::vector<uint8_t>& out, size_t elements, DataType type, std::mt19937& random) {
  std::normal_distribution<float> normal;
  out.resize(elements * ItemSize(type));
  for (size_t i = 0; i < elements; ++i) {
    const float x = normal(random);
    if (type == DataType::kFloat32) {
      std::memcpy(&out[i * 4], &x, 4);
    } else {
      const uint16_t bits = type == DataType::kFloat16 ? FromFloat<Half>(x).bits : FromFloat<BFloat16>(x).bits;
      std::memcpy(&out[i * 2], &bits, 2);
    }
  }
}

inline std::vector<float> AsFloats(const std::vector<uint8_t>& bytes, DataType type) {
  std::vector<float> out(bytes.size() / ItemSize(type));
  for (size_t i = 0; i < out.size(); ++i) {
    if (type == DataType::kFloat32) {
      std::memcpy(&out[i], &bytes[i * 4], 4);
    } else {
      uint16_t bits;
      std::memcpy(&bits, &bytes[i * 2], 2);
      out[i] = type == DataType::kFloat16 ? ToFloat(Half{bits}) : ToFloat(BFloat16{bits});
    }
  }
  return out;
}

inline float RandomLogBeta(Config::Retention retention, int32_t stream, std::mt19937& random) {
  switch (retention) {
    case Config::kEqual:  // all zero: every score ties
      return random() % 2 ? 0.0f : -0.0f;
    case Config::kOneStream:  // one stream wins everything
      return stream == 1 ? -1e-6f * (1 + random() % 7) : -1.0f - random() % 5;
    case Config::kFew:  // powers of two: many exact ties across positions and streams
      return -std::ldexp(1.0f, -static_cast<int>(random() % 4));
    default:
      return -std::exp(std::uniform_real_distribution<float>(-8.0f, 2.0f)(random));
  }
}

// `tokens[row]` valid tokens for each row.
inline Step RandomStep(const Config& config, const std::vector<int32_t>& tokens, std::mt19937& random) {
  const CacheShape& s = config.shape;
  Step step;
  step.step_tokens = tokens;
  step.budget.assign(s.batch, config.kept());
  const size_t rows = static_cast<size_t>(s.batch) * config.max_steps * s.num_kv_heads;
  for (int32_t layer = 0; layer < s.num_layers; ++layer) {
    step.query.emplace_back();
    step.key.emplace_back();
    step.value.emplace_back();
    FillRandom(step.query.back(), rows * config.group * s.head_dim, config.type, random);
    FillRandom(step.key.back(), rows * s.head_dim, config.type, random);
    FillRandom(step.value.back(), rows * s.head_dim, config.type, random);
    std::vector<float> log_beta(rows);
    for (size_t i = 0; i < rows; ++i) {
      const int32_t head = static_cast<int32_t>(i % s.num_kv_heads);
      log_beta[i] = RandomLogBeta(config.retention, layer * s.num_kv_heads + head, random);
    }
    step.log_beta.push_back(std::move(log_beta));
  }
  return step;
}

// PoolUpdate of one row, as policy/cache.py does it.
inline void ReferenceUpdateRow(const Config& config, State& state, const Step& step, int32_t b) {
  const CacheShape& s = config.shape;
  const int32_t streams = s.num_streams(), slots = s.num_slots, fresh = step.step_tokens[b];
  if (fresh == 0) return;
  const size_t row = s.head_dim * ItemSize(config.type);
  int32_t* counters = &state.counters[static_cast<size_t>(b) * kNumCounters];
  int32_t* start = &state.stream_start[static_cast<size_t>(b) * (streams + 1)];
  const int64_t pool = static_cast<int64_t>(b) * slots;
  const int32_t seen = counters[kTokensSeen] + fresh, recent = counters[kRecentTokens], outside = recent + fresh;

  struct Entry {
    std::vector<uint8_t> key, value;
    float log_beta;
    int32_t position, stream;
  };
  std::vector<Entry> out;
  for (int32_t token = 0; token < outside; ++token) {
    for (int32_t stream = 0; stream < streams; ++stream) {
      Entry entry;
      entry.position = seen - outside + token;
      entry.stream = stream;
      const uint8_t *key, *value;
      if (token < recent) {
        const int64_t at = (static_cast<int64_t>(b) * streams + stream) * s.evict_every + token;
        key = &state.recent_key[at * row];
        value = &state.recent_value[at * row];
        entry.log_beta = state.recent_log_beta[at];
      } else {
        const int32_t layer = stream / s.num_kv_heads;
        const int64_t at =
            (static_cast<int64_t>(b) * config.max_steps + token - recent) * s.num_kv_heads + stream % s.num_kv_heads;
        key = &step.key[layer][at * row];
        value = &step.value[layer][at * row];
        entry.log_beta = step.log_beta[layer][at];
      }
      entry.key.assign(key, key + row);
      entry.value.assign(value, value + row);
      out.push_back(std::move(entry));
    }
  }

  std::vector<int32_t> owner(slots, streams);
  for (int32_t stream = 0; stream < streams; ++stream) {
    for (int32_t i = start[stream]; i < start[stream + 1]; ++i) owner[state.slot_index[pool + i]] = stream;
  }
  const int32_t live = start[streams], budget = step.budget[b];
  const bool evict =
      live + static_cast<int64_t>(out.size()) >= static_cast<int64_t>(streams) * (budget + s.evict_every);
  std::vector<bool> out_keep(out.size(), false);
  int32_t moved_tokens = outside;
  if (evict) {
    struct Candidate {
      float score;
      int32_t position, stream, index;  // slot, or slots + number outside
    };
    std::vector<Candidate> all;
    for (int32_t slot = 0; slot < slots; ++slot) {
      if (owner[slot] == streams) continue;
      const int32_t position = state.pool_position[pool + slot];
      const float score = RetentionScore(state.pool_log_beta[pool + slot], position, seen, config.lookahead_steps);
      all.push_back({score, position, owner[slot], slot});
    }
    for (size_t e = 0; e < out.size(); ++e) {
      const float score = RetentionScore(out[e].log_beta, out[e].position, seen, config.lookahead_steps);
      all.push_back({score, out[e].position, out[e].stream, slots + static_cast<int32_t>(e)});
    }
    std::sort(all.begin(), all.end(), [](const Candidate& x, const Candidate& y) {
      if (x.score != y.score) return x.score > y.score;
      if (x.position != y.position) return x.position > y.position;
      return x.stream < y.stream;
    });
    std::vector<int32_t> quota(streams, budget);
    if (config.policy == Policy::kGlobal) {
      std::fill(quota.begin(), quota.end(), config.min_tokens_per_head);
      const int64_t winners = static_cast<int64_t>(streams) * (budget - config.min_tokens_per_head);
      for (int64_t i = 0; i < winners; ++i) ++quota[all[i].stream];
    }
    std::vector<bool> keep(slots, false);
    for (const Candidate& candidate : all) {
      if (quota[candidate.stream]-- <= 0) continue;
      if (candidate.index < slots) {
        keep[candidate.index] = true;
      } else {
        out_keep[candidate.index - slots] = true;
      }
    }
    for (int32_t slot = 0; slot < slots; ++slot) {
      if (!keep[slot]) owner[slot] = streams;
    }
  } else {
    moved_tokens = std::min(outside, (slots - live) / streams);
    std::fill_n(out_keep.begin(), static_cast<size_t>(moved_tokens) * streams, true);
  }

  int32_t slot = 0;
  for (size_t e = 0; e < out.size(); ++e) {
    if (!out_keep[e]) continue;
    while (owner[slot] != streams) ++slot;
    owner[slot] = out[e].stream;
    std::copy(out[e].key.begin(), out[e].key.end(), &state.pool_key[(pool + slot) * row]);
    std::copy(out[e].value.begin(), out[e].value.end(), &state.pool_value[(pool + slot) * row]);
    state.pool_log_beta[pool + slot] = out[e].log_beta;
    state.pool_position[pool + slot] = out[e].position;
  }
  if (moved_tokens > 0) {
    std::vector<int32_t> order(slots);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) { return owner[x] < owner[y]; });
    std::copy(order.begin(), order.end(), &state.slot_index[pool]);
    for (int32_t stream = 0; stream <= streams; ++stream) {
      start[stream] =
          static_cast<int32_t>(std::count_if(owner.begin(), owner.end(), [&](int32_t of) { return of < stream; }));
    }
  }
  for (int32_t token = moved_tokens; token < outside; ++token) {
    for (int32_t stream = 0; stream < streams; ++stream) {
      const Entry& entry = out[static_cast<size_t>(token) * streams + stream];
      const int64_t at = (static_cast<int64_t>(b) * streams + stream) * s.evict_every + token - moved_tokens;
      std::copy(entry.key.begin(), entry.key.end(), &state.recent_key[at * row]);
      std::copy(entry.value.begin(), entry.value.end(), &state.recent_value[at * row]);
      state.recent_log_beta[at] = entry.log_beta;
    }
  }
  counters[kTokensSeen] = seen;
  counters[kPoolEntries] = start[streams];
  counters[kRecentTokens] = outside - moved_tokens;
  counters[kEvictions] += evict;
}

inline void ReferenceUpdate(const Config& config, State& state, const Step& step) {
  for (int32_t b = 0; b < config.shape.batch; ++b) ReferenceUpdateRow(config, state, step, b);
}

// PoolAttention of all rows in double: [B, S, H·G, D].
inline std::vector<float> ReferenceAttention(const Config& config, const State& state, const Step& step, int32_t layer,
                                             float scale) {
  const CacheShape& s = config.shape;
  const int32_t depth = s.head_dim, streams = s.num_streams(), heads = s.num_kv_heads;
  const auto query = AsFloats(step.query[layer], config.type);
  const auto key = AsFloats(step.key[layer], config.type), value = AsFloats(step.value[layer], config.type);
  const auto pool_key = AsFloats(state.pool_key, config.type), pool_value = AsFloats(state.pool_value, config.type);
  const auto recent_key = AsFloats(state.recent_key, config.type);
  const auto recent_value = AsFloats(state.recent_value, config.type);
  std::vector<float> attended(query.size(), 0.0f);
  for (int32_t b = 0; b < s.batch; ++b) {
    const int32_t* start = &state.stream_start[static_cast<size_t>(b) * (streams + 1)];
    const int32_t recent = state.counters[static_cast<size_t>(b) * kNumCounters + kRecentTokens];
    for (int32_t head = 0; head < heads; ++head) {
      const int32_t stream = layer * heads + head;
      for (int32_t t = 0; t < step.step_tokens[b]; ++t) {
        std::vector<const float*> keys, values;
        for (int32_t i = start[stream]; i < start[stream + 1]; ++i) {
          const int64_t slot =
              static_cast<int64_t>(b) * s.num_slots + state.slot_index[static_cast<int64_t>(b) * s.num_slots + i];
          keys.push_back(&pool_key[slot * depth]);
          values.push_back(&pool_value[slot * depth]);
        }
        for (int32_t i = 0; i < recent; ++i) {
          const int64_t at = (static_cast<int64_t>(b) * streams + stream) * s.evict_every + i;
          keys.push_back(&recent_key[at * depth]);
          values.push_back(&recent_value[at * depth]);
        }
        for (int32_t i = 0; i <= t; ++i) {
          const int64_t at = (static_cast<int64_t>(b) * config.max_steps + i) * heads + head;
          keys.push_back(&key[at * depth]);
          values.push_back(&value[at * depth]);
        }
        for (int32_t g = 0; g < config.group; ++g) {
          const int64_t at = ((static_cast<int64_t>(b) * config.max_steps + t) * heads + head) * config.group + g;
          std::vector<double> logits(keys.size());
          double most = -std::numeric_limits<double>::infinity(), sum = 0;
          for (size_t e = 0; e < keys.size(); ++e) {
            double dot = 0;
            for (int32_t d = 0; d < depth; ++d) dot += static_cast<double>(query[at * depth + d]) * keys[e][d];
            logits[e] = dot * scale;
            most = std::max(most, logits[e]);
          }
          std::vector<double> total(depth, 0.0);
          for (size_t e = 0; e < keys.size(); ++e) {
            const double weight = std::exp(logits[e] - most);
            sum += weight;
            for (int32_t d = 0; d < depth; ++d) total[d] += weight * values[e][d];
          }
          for (int32_t d = 0; d < depth; ++d) attended[at * depth + d] = static_cast<float>(total[d] / sum);
        }
      }
    }
  }
  return attended;
}

// Arguments over host or device memory alike: `at(vector)` gives the pointer to use for a vector.
template <class At>
PoolUpdateArgs UpdateArgs(const Config& config, State& state, Step& step, void* workspace, const At& at) {
  PoolUpdateArgs args = {};
  args.shape = config.shape;
  args.type = config.type;
  args.policy = config.policy;
  args.min_tokens_per_head = config.min_tokens_per_head;
  args.lookahead_steps = config.lookahead_steps;
  args.steps = config.max_steps;
  args.pool_key = at(state.pool_key);
  args.pool_value = at(state.pool_value);
  args.pool_log_beta = at(state.pool_log_beta);
  args.pool_position = at(state.pool_position);
  args.slot_index = at(state.slot_index);
  args.stream_start = at(state.stream_start);
  args.recent_key = at(state.recent_key);
  args.recent_value = at(state.recent_value);
  args.recent_log_beta = at(state.recent_log_beta);
  args.counters = at(state.counters);
  args.step_tokens = at(step.step_tokens);
  args.budget = at(step.budget);
  for (int32_t layer = 0; layer < config.shape.num_layers; ++layer) {
    args.key[layer] = at(step.key[layer]);
    args.value[layer] = at(step.value[layer]);
    args.log_beta[layer] = at(step.log_beta[layer]);
  }
  args.workspace = workspace;
  return args;
}

template <class At>
PoolAttentionArgs AttentionArgs(const Config& config, State& state, Step& step, int32_t layer, float scale,
                                void* attended, void* workspace, const At& at) {
  PoolAttentionArgs args = {};
  args.shape = config.shape;
  args.type = config.type;
  args.layer = layer;
  args.group = config.group;
  args.steps = config.max_steps;
  args.scale = scale;
  args.query = at(step.query[layer]);
  args.key = at(step.key[layer]);
  args.value = at(step.value[layer]);
  args.pool_key = at(state.pool_key);
  args.pool_value = at(state.pool_value);
  args.slot_index = at(state.slot_index);
  args.stream_start = at(state.stream_start);
  args.recent_key = at(state.recent_key);
  args.recent_value = at(state.recent_value);
  args.counters = at(state.counters);
  args.step_tokens = at(step.step_tokens);
  args.attended = attended;
  args.workspace = workspace;
  return args;
}

// Tokens of each row for the next step: mostly single tokens, sometimes chunks, sometimes none.
inline std::vector<int32_t> RandomTokens(const Config& config, std::mt19937& random) {
  std::vector<int32_t> tokens(config.shape.batch);
  for (int32_t& count : tokens) {
    const uint32_t kind = random() % 8;
    count = kind == 0 ? 0 : kind < 5 ? 1 : 1 + static_cast<int32_t>(random() % config.max_steps);
    if (kind == 7) count = config.max_steps;
  }
  return tokens;
}

// Every policy and every degenerate case; shapes are small enough for an emulated block.
inline std::vector<Config> UpdateConfigs() {
  std::vector<Config> configs;
  const auto add = [&](const char* name, CacheShape shape, auto change) {
    Config config;
    config.name = name;
    config.shape = shape;
    change(config);
    configs.push_back(config);
  };
  const CacheShape usual = {2, 3, 2, 8, 6 * 8, 4};
  add("global", usual, [](Config&) {});
  add("global, fp16", usual, [](Config& c) { c.type = DataType::kFloat16; });
  add("rows of 10 bytes", {2, 2, 1, 5, 2 * 8, 4}, [](Config& c) { c.type = DataType::kFloat16; });
  add("equal scores", usual, [](Config& c) { c.retention = Config::kEqual; });
  add("few scores", usual, [](Config& c) { c.retention = Config::kFew; });
  add("one stream holds all", usual, [](Config& c) { c.retention = Config::kOneStream; });
  add("budget 1, every token", {2, 2, 2, 8, 4, 1}, [](Config&) {});
  add("one stream", {1, 1, 1, 8, 8, 3}, [](Config& c) { c.max_steps = 9; });
  add("smaller budget", usual, [](Config& c) { c.budget = 5; });
  add("per head", usual, [](Config& c) { c.policy = Policy::kPerHead; });
  add("per head, equal scores", usual, [](Config& c) {
    c.policy = Policy::kPerHead;
    c.retention = Config::kEqual;
  });
  add("per head, few scores, smaller budget", usual, [](Config& c) {
    c.policy = Policy::kPerHead;
    c.retention = Config::kFew;
    c.budget = 3;
  });
  add("minimum per head", usual, [](Config& c) { c.min_tokens_per_head = 2; });
  add("minimum per head, one stream", usual, [](Config& c) {
    c.min_tokens_per_head = 3;
    c.retention = Config::kOneStream;
  });
  add("minimum per head, few scores", usual, [](Config& c) {
    c.min_tokens_per_head = 2;
    c.retention = Config::kFew;
  });
  add("minimum is the budget", usual, [](Config& c) { c.min_tokens_per_head = 8; });
  add("lookahead", usual, [](Config& c) { c.lookahead_steps = 4; });
  add("lookahead, minimum per head", usual, [](Config& c) {
    c.lookahead_steps = 16;
    c.min_tokens_per_head = 1;
  });
  add("chunks beyond the pool", {1, 2, 2, 8, 4 * 4, 2}, [](Config& c) { c.max_steps = 40; });
  add("streams that a whole block ranks", {1, 2, 2, 2, 4 * 1200, 8}, [](Config& c) {
    c.max_steps = 800;
    c.retention = Config::kOneStream;
    c.min_tokens_per_head = 3;
  });
  add("many streams", {1, 9, 8, 8, 72 * 4, 2}, [](Config&) {});
  return configs;
}

}  // namespace trimkv::cuda
