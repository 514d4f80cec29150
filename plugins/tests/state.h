// Caches and steps to try kernels on: host copies of every tensor of kernels.h, for any storage type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "trimkv/kernels.h"
#include "trimkv/scalar.h"

namespace trimkv::test {

struct Config {
  // How log-retentions are drawn; see RandomLogBeta.
  enum Retention { kRandom, kWide, kEqual, kOneStream, kFew, kWhole, kHalves };

  const char* name = "";
  CacheShape shape = {1, 2, 2, 8, 16, 2};
  int32_t group = 2;
  int32_t max_steps = 4;  // of the longest step
  Policy policy = Policy::kGlobal;
  int32_t min_tokens_per_head = 0;
  int32_t lookahead_steps = 1;
  int32_t budget = 0;     // entries per stream, 0: what the pool was built for
  float logit_scale = 0;  // on query · key, 0: 1 / sqrt(D)
  DataType type = DataType::kFloat32;
  Retention retention = kRandom;

  int32_t kept() const { return budget > 0 ? budget : shape.num_slots / shape.num_streams(); }
  static Config Of(const char* name, CacheShape shape, int32_t group, int32_t max_steps, DataType type) {
    Config config;
    config.name = name;
    config.shape = shape;
    config.group = group;
    config.max_steps = max_steps;
    config.type = type;
    return config;
  }

  size_t row_bytes() const { return shape.head_dim * ItemSize(type); }
  float scale() const { return logit_scale > 0 ? logit_scale : 1 / std::sqrt(static_cast<float>(shape.head_dim)); }
};

using Bytes = std::vector<uint8_t>;

// Storage of a type, and back.
inline Bytes Store(const std::vector<float>& from, DataType type) {
  Bytes out(from.size() * ItemSize(type));
  for (size_t i = 0; i < from.size(); ++i) {
    if (type == DataType::kFloat32) {
      std::memcpy(&out[i * 4], &from[i], 4);
    } else {
      const uint16_t bits =
          type == DataType::kFloat16 ? FromFloat<Half>(from[i]).bits : FromFloat<BFloat16>(from[i]).bits;
      std::memcpy(&out[i * 2], &bits, 2);
    }
  }
  return out;
}
inline std::vector<float> Load(const uint8_t* from, size_t count, DataType type) {
  std::vector<float> out(count);
  for (size_t i = 0; i < count; ++i) {
    if (type == DataType::kFloat32) {
      std::memcpy(&out[i], from + i * 4, 4);
    } else {
      uint16_t bits;
      std::memcpy(&bits, from + i * 2, 2);
      out[i] = type == DataType::kFloat16 ? ToFloat(Half{bits}) : ToFloat(BFloat16{bits});
    }
  }
  return out;
}
inline std::vector<float> Load(const Bytes& from, DataType type) {
  return Load(from.data(), from.size() / ItemSize(type), type);
}

// Aligned as a workspace must be, and full of NaNs: what nobody has written must not matter.
class Garbage {
 public:
  explicit Garbage(size_t bytes) : lines_(bytes / sizeof(Line) + 1) {
    std::memset(static_cast<void*>(lines_.data()), 0xff, lines_.size() * sizeof(Line));
  }
  void* data() { return lines_.data(); }

 private:
  struct alignas(256) Line {
    char bytes[256];
  };
  std::vector<Line> lines_;
};

// The ten state tensors of all rows. Keys and values, of which nothing is live, start as NaNs: they must never show.
struct State {
  Bytes pool_key, pool_value, recent_key, recent_value;
  std::vector<float> pool_log_beta, recent_log_beta;
  std::vector<int32_t> pool_position, slot_index, stream_start, counters;

  explicit State(const Config& config) {
    const CacheShape& s = config.shape;
    const size_t batch = s.batch, pool = batch * s.num_slots, recent = batch * s.num_streams() * s.evict_every;
    pool_key.assign(pool * config.row_bytes(), 0xff);
    pool_value = pool_key;
    recent_key.assign(recent * config.row_bytes(), 0xff);
    recent_value = recent_key;
    pool_log_beta.resize(pool);
    recent_log_beta.resize(recent);
    pool_position.resize(pool);
    slot_index.resize(pool);
    stream_start.resize(batch * (s.num_streams() + 1));
    counters.resize(batch * kNumCounters);
  }

  // Calls `visit` with each tensor.
  template <class Visit>
  void Each(const Visit& visit) {
    for (Bytes* tensor : {&pool_key, &pool_value, &recent_key, &recent_value}) visit(*tensor);
    for (std::vector<float>* tensor : {&pool_log_beta, &recent_log_beta}) visit(*tensor);
    for (std::vector<int32_t>* tensor : {&pool_position, &slot_index, &stream_start, &counters}) visit(*tensor);
  }

  void Reset(const Config& config, int32_t row) {
    const int64_t starts = config.shape.num_streams() + 1;
    std::fill_n(stream_start.begin() + row * starts, starts, 0);
    std::fill_n(counters.begin() + row * int64_t{kNumCounters}, static_cast<int>(kNumCounters), 0);
  }

  int32_t counter(int32_t row, Counter field) const {
    return counters[static_cast<size_t>(row) * kNumCounters + field];
  }

  // Name of the first tensor that differs in any bit, live or not; null if none.
  const char* Difference(const State& other) const {
    const auto differ = [](const auto& a, const auto& b) {
      return a.size() != b.size() || std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) != 0;
    };
    if (differ(counters, other.counters)) return "counters";
    if (differ(stream_start, other.stream_start)) return "stream_start";
    if (differ(slot_index, other.slot_index)) return "slot_index";
    if (differ(pool_position, other.pool_position)) return "pool_position";
    if (differ(pool_log_beta, other.pool_log_beta)) return "pool_log_beta";
    if (differ(pool_key, other.pool_key)) return "pool_key";
    if (differ(pool_value, other.pool_value)) return "pool_value";
    if (differ(recent_key, other.recent_key)) return "recent_key";
    if (differ(recent_value, other.recent_value)) return "recent_value";
    if (differ(recent_log_beta, other.recent_log_beta)) return "recent_log_beta";
    return nullptr;
  }
};

// What one step brings.
struct Step {
  int32_t steps = 1;                         // S
  std::vector<int32_t> step_tokens, budget;  // [B]
  std::vector<Bytes> query, key, value;      // per layer [B, S, H·G, D] and [B, S, H, D]
  std::vector<std::vector<float>> log_beta;  // per layer [B, S, H]
};

inline float RandomLogBeta(Config::Retention retention, int32_t stream, std::mt19937& random) {
  const auto normal = [&] { return std::normal_distribution<float>()(random); };
  switch (retention) {
    case Config::kWide:
      return -std::exp(3 * normal() - 3);
    case Config::kEqual:  // all zero: every score ties
      return random() % 2 ? 0.0f : -0.0f;
    case Config::kOneStream:  // one stream wins everything
      return stream == 1 ? -1e-6f * (1 + random() % 7) : -1.0f - random() % 5;
    case Config::kFew:  // powers of two: many exact ties across positions and streams
      return -std::ldexp(1.0f, -static_cast<int>(random() % 4));
    case Config::kWhole:  // 0, -1, -2 …: many ties
      return -std::floor(std::fabs(normal()));
    case Config::kHalves:
      return -std::floor(2 * std::fabs(normal()));
    case Config::kRandom:
      break;
  }
  return -std::exp(std::uniform_real_distribution<float>(-8.0f, 2.0f)(random));
}

// A step of `steps` tokens, of which `tokens[row]` are valid. Behind them all is NaN: it must never show.
inline Step RandomStep(const Config& config, int32_t steps, const std::vector<int32_t>& tokens, std::mt19937& random) {
  const CacheShape& s = config.shape;
  Step step;
  step.steps = steps;
  step.step_tokens = tokens;
  step.budget.assign(s.batch, config.kept());
  const size_t rows = static_cast<size_t>(s.batch) * steps * s.num_kv_heads;
  std::normal_distribution<float> normal;
  const auto draw = [&](size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return Store(values, config.type);
  };
  for (int32_t layer = 0; layer < s.num_layers; ++layer) {
    step.query.push_back(draw(rows * config.group * s.head_dim));
    step.key.push_back(draw(rows * s.head_dim));
    step.value.push_back(draw(rows * s.head_dim));
    std::vector<float> log_beta(rows);
    for (size_t i = 0; i < rows; ++i) {
      const int32_t head = static_cast<int32_t>(i % s.num_kv_heads);
      log_beta[i] = RandomLogBeta(config.retention, layer * s.num_kv_heads + head, random);
    }
    step.log_beta.push_back(std::move(log_beta));
    const auto spoil = [&](auto& fresh, auto nan) {
      const size_t token = fresh.size() / (static_cast<size_t>(s.batch) * steps);
      for (size_t b = 0; b < tokens.size(); ++b) {
        std::fill(fresh.begin() + (b * steps + tokens[b]) * token, fresh.begin() + (b + 1) * steps * token, nan);
      }
    };
    for (Bytes* fresh : {&step.query.back(), &step.key.back(), &step.value.back()}) spoil(*fresh, uint8_t{0xff});
    spoil(step.log_beta.back(), NAN);
  }
  return step;
}

// Tokens of each row for a step of `steps`: mostly single tokens, sometimes chunks, sometimes none.
inline std::vector<int32_t> RandomTokens(const Config& config, int32_t steps, std::mt19937& random) {
  std::vector<int32_t> tokens(config.shape.batch);
  for (int32_t& count : tokens) {
    const uint32_t kind = random() % 8;
    count = kind == 0 ? 0 : kind < 5 ? 1 : 1 + static_cast<int32_t>(random() % steps);
    if (kind == 7) count = steps;
  }
  return tokens;
}

// Arguments over host or device memory alike: `at(vector)` gives the pointer to use for a vector.
template <class At>
PoolUpdateArgs UpdateArgs(const Config& config, State& state, const Step& step, void* workspace, const At& at) {
  PoolUpdateArgs args = {};
  args.shape = config.shape;
  args.type = config.type;
  args.policy = config.policy;
  args.min_tokens_per_head = config.min_tokens_per_head;
  args.lookahead_steps = config.lookahead_steps;
  args.steps = step.steps;
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
PoolAttentionArgs AttentionArgs(const Config& config, const State& state, const Step& step, int32_t layer,
                                void* attended, void* workspace, const At& at) {
  PoolAttentionArgs args = {};
  args.shape = config.shape;
  args.type = config.type;
  args.layer = layer;
  args.group = config.group;
  args.steps = step.steps;
  args.scale = config.scale();
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

// For `at` above: host memory.
inline constexpr auto kOnHost = [](auto& vector) { return vector.data(); };

// For `at` above: host memory of a batch of one, given to a kernel as row `row` of a larger batch. The other rows'
// memory is not there.
struct AsRow {
  int64_t row;

  template <class T>
  T* Move(T* of_row, size_t bytes) const {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(of_row) - row * bytes);
  }
  template <class Vector>
  auto operator()(Vector& vector) const {
    return Move(vector.data(), vector.size() * sizeof vector[0]);
  }
};
// Behind as many rows of more than 2^15 elements lie more than 2^31 elements.
inline constexpr int32_t kLastRow = 65534;

}  // namespace trimkv::test
