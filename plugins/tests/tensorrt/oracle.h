// Runs of the official package (tests/golden), as write_oracle.py stores them: what its gates said, and what it kept
// after every step.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "state.h"

namespace trimkv::test {

struct OracleCase {
  std::string name;
  Config config;
  std::vector<float> log_beta;                            // [L, H, tokens]
  int32_t tokens;                                         // of the whole run
  std::vector<int32_t> lengths;                           // of its steps
  std::vector<std::vector<std::array<int32_t, 3>>> kept;  // per step: layer, KV head, position; sorted
};

// All cases of a file; exits where there is no such file.
inline std::vector<OracleCase> ReadOracle(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "%s cannot be read; write_oracle.py writes it\n", path);
    std::exit(1);
  }
  const auto read = [&](auto* to, size_t count) {
    file.read(reinterpret_cast<char*>(to), static_cast<std::streamsize>(count * sizeof *to));
  };
  const auto number = [&] {
    int32_t value = 0;
    read(&value, 1);
    return value;
  };
  std::vector<OracleCase> cases(static_cast<size_t>(number()));
  for (OracleCase& c : cases) {
    c.name.resize(static_cast<size_t>(number()));
    read(c.name.data(), c.name.size());
    Config& config = c.config;
    config.name = c.name.c_str();
    const int32_t layers = number(), heads = number(), budget = number(), evict_every = number();
    config.shape = {1, layers, heads, 8, layers * heads * budget, evict_every};
    config.policy = static_cast<Policy>(number());
    config.min_tokens_per_head = number();
    config.lookahead_steps = number();
    c.tokens = number();
    c.lengths.resize(static_cast<size_t>(number()));
    read(c.lengths.data(), c.lengths.size());
    c.log_beta.resize(static_cast<size_t>(layers) * heads * c.tokens);
    read(c.log_beta.data(), c.log_beta.size());
    for (size_t step = 0; step < c.lengths.size(); ++step) {
      c.kept.emplace_back(static_cast<size_t>(number()));
      read(c.kept.back().data(), c.kept.back().size());
    }
  }
  if (!file) {
    std::fprintf(stderr, "%s is too short\n", path);
    std::exit(1);
  }
  return cases;
}

// What a row keeps, as the official package would list it.
inline std::vector<std::array<int32_t, 3>> Kept(const Config& config, const State& state, int32_t row) {
  const CacheShape& s = config.shape;
  std::vector<std::array<int32_t, 3>> kept;
  const int32_t recent = state.counter(row, kRecentTokens), seen = state.counter(row, kTokensSeen);
  for (int32_t stream = 0; stream < s.num_streams(); ++stream) {
    const int32_t* start = &state.stream_start[row * (s.num_streams() + 1) + stream];
    for (int32_t i = start[0]; i < start[1]; ++i) {
      const int32_t slot = state.slot_index[row * s.num_slots + i];
      kept.push_back({stream / s.num_kv_heads, stream % s.num_kv_heads, state.pool_position[row * s.num_slots + slot]});
    }
    for (int32_t token = 0; token < recent; ++token) {
      kept.push_back({stream / s.num_kv_heads, stream % s.num_kv_heads, seen - recent + token});
    }
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

}  // namespace trimkv::test
