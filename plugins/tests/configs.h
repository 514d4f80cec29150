// Caches to try every policy and every degenerate case on; small enough for an emulated block.
#pragma once

#include <vector>

#include "state.h"

namespace trimkv::test {

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

}  // namespace trimkv::test
