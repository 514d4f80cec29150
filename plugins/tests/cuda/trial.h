// A model's steps on a device against judges: attention within rounding, the cache state to the bit after every step,
// and replayed CUDA graphs to the bit. `Model` is a DeviceState with LaunchStep().
#pragma once

#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <string_view>
#include <vector>

#include "device_state.h"
#include "judges.h"

namespace trimkv::test {

inline int failures = 0;

inline bool Expect(bool condition, const Config& config, int step, const char* what, const char* judge) {
  if (condition) return true;
  ++failures;
  std::fprintf(stderr, "FAILED %s, step %d, by %s: %s\n", config.name, step, judge, what);
  return false;
}

// How a cache is tried.
struct Trial {
  int steps;      // at least
  int evictions;  // at least, of all rows together
  bool large;     // steps differ in length, mostly one token once the caches are full
  Tolerance float32, float16, bfloat16;

  Tolerance of(DataType type) const {
    return type == DataType::kFloat32 ? float32 : type == DataType::kFloat16 ? float16 : bfloat16;
  }
  int32_t NextLength(const Config& config, const State& state, std::mt19937& random) const {
    if (!large) return config.max_steps;
    bool filling = false;
    for (int32_t row = 0; row < config.shape.batch; ++row) {
      filling |= state.counter(row, kTokensSeen) < config.kept() + config.shape.evict_every;
    }
    if (random() % (filling ? 2 : 24) != 0) return 1;
    return random() % 4 == 0 ? 1 + static_cast<int32_t>(random() % 4) : config.max_steps;  // few: the decode path too
  }
};

// One conversation of random steps, launch by launch and as replayed CUDA graphs of the whole step.
template <class Model>
void Run(const Config& config, const Trial& trial, std::vector<Judge> judges) {
  std::mt19937 random(std::hash<std::string_view>()(config.name));
  const auto draw = [&](int32_t steps) {
    return RandomStep(config, steps, RandomTokens(config, steps, random), random);
  };
  const Step longest = draw(config.max_steps);
  Model plain(config, longest);
  Model recorded(config, longest);
  std::map<int32_t, Graph> graphs;  // by the length of the step
  int evictions = 0, i = 0;
  for (; i < trial.steps || (evictions < trial.evictions && i < 1000); ++i) {
    const int32_t row = static_cast<int32_t>(random() % config.shape.batch);
    if (random() % (trial.large ? 200 : 12) == 0 && plain.state.counter(row, kEvictions) > 0) {
      for (Judge& judge : judges) judge.state.Reset(config, row);
      plain.ResetRow(row);
      recorded.ResetRow(row);
    }
    const Step step = draw(trial.NextLength(config, judges[0].state, random));
    const std::vector<int32_t> before = plain.state.counters;
    plain.UploadStep(step);
    recorded.UploadStep(step);
    plain.LaunchStep();
    const auto graph = graphs.try_emplace(step.steps, recorded.stream, [&] { recorded.LaunchStep(); }).first;
    graph->second.Replay();
    CUDA_OK(cudaDeviceSynchronize());
    plain.DownloadResults();
    recorded.DownloadResults();

    for (int32_t layer = 0; layer < config.shape.num_layers; ++layer) {
      const std::vector<float> actual = Load(plain.attended[layer], config.type);
      for (const Judge& judge : judges) {
        const bool near = Near(actual, judge.Attend(config, step, layer), trial.of(config.type));
        if (!Expect(near, config, i, "attended", judge.name)) return;
      }
      const bool same = plain.attended[layer] == recorded.attended[layer];
      if (!Expect(same, config, i, "attended differs", "the graph")) return;
    }
    for (Judge& judge : judges) {
      judge.Update(config, step);
      const char* difference = plain.state.Difference(judge.state);
      if (!Expect(difference == nullptr, config, i, difference, judge.name)) return;
    }
    const char* difference = recorded.state.Difference(plain.state);
    if (!Expect(difference == nullptr, config, i, difference, "the graph")) return;
    for (int32_t b = 0; b < config.shape.batch; ++b) {
      evictions += plain.state.counter(b, kEvictions) - before[b * kNumCounters + kEvictions];
    }
  }
  Expect(evictions >= trial.evictions, config, i, "too few evictions were tried", "this test");
  std::printf("%-50s %4d steps, %4d evictions\n", config.name, i, evictions);
}

}  // namespace trimkv::test
