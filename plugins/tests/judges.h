// Who says what a kernel must give: the slow reference, or the CPU kernels, which larger caches can afford.
#pragma once

#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/pool_attention.h"
#include "cpu/pool_update.h"
#include "reference.h"

namespace trimkv::test {

// Tasks on real threads, as many as `threads` says.
inline void RunThreads(void* threads, size_t count, void (*task)(void*, size_t), void* user) {
  const size_t most = *static_cast<const size_t*>(threads);
  std::vector<std::thread> workers;
  for (size_t t = 0; t < most && t < count; ++t) {
    workers.emplace_back([=] {
      for (size_t i = t; i < count; i += most) task(user, i);
    });
  }
  for (std::thread& worker : workers) worker.join();
}

// All cores, where the cache is worth starting threads for.
inline cpu::Parallel ThreadsFor(const State& state) {
  static size_t threads = std::max(1u, std::thread::hardware_concurrency());
  if (state.pool_key.size() < size_t{1} << 20) return cpu::Serial();
  return {RunThreads, &threads, static_cast<int>(threads)};
}

inline std::vector<float> CpuAttention(const Config& config, const State& state, const Step& step, int32_t layer) {
  Bytes attended(step.query[layer].size());
  PoolAttentionArgs args = AttentionArgs(config, state, step, layer, attended.data(), nullptr, kOnHost);
  Garbage workspace(cpu::PoolAttentionWorkspaceBytes(args));
  args.workspace = workspace.data();
  cpu::PoolAttention(args, ThreadsFor(state));
  return Load(attended, config.type);
}

inline void CpuUpdate(const Config& config, State& state, const Step& step) {
  PoolUpdateArgs args = UpdateArgs(config, state, step, nullptr, kOnHost);
  Garbage workspace(cpu::PoolUpdateWorkspaceBytes(args));
  args.workspace = workspace.data();
  cpu::PoolUpdate(args, ThreadsFor(state));
}

// One conversation as a judge sees it.
struct Judge {
  const char* name;
  std::vector<float> (*attention)(const Config&, const State&, const Step&, int32_t layer);
  void (*update)(const Config&, State&, const Step&);
  State state;

  std::vector<float> Attend(const Config& config, const Step& step, int32_t layer) const {
    return attention(config, state, step, layer);
  }
  void Update(const Config& config, const Step& step) { update(config, state, step); }
};

inline Judge SlowJudge(const Config& config) {
  return {"the reference", ReferenceAttention, ReferenceUpdate, State(config)};
}
inline Judge CpuJudge(const Config& config) { return {"the CPU kernels", CpuAttention, CpuUpdate, State(config)}; }

// What attention may be off by: `absolute + relative · |expected|`.
struct Tolerance {
  float absolute, relative;
};

// Whether all values are near; prints the first that is not. NaNs are not.
inline bool Near(const std::vector<float>& actual, const std::vector<float>& expected, Tolerance tolerance) {
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::fabs(actual[i] - expected[i]) <= tolerance.absolute + tolerance.relative * std::fabs(expected[i]))
      continue;
    std::fprintf(stderr, "  element %zu is %g, expected %g\n", i, actual[i], expected[i]);
    return false;
  }
  return actual.size() == expected.size();
}

}  // namespace trimkv::test
