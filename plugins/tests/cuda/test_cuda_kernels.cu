// Both operators on a GPU against the host reference: attention within rounding, the cache state to the bit. Every case
// runs twice, launch by launch and as a replayed CUDA graph, and the two must agree to the bit.
//
//   test_cuda_kernels [short]    short: fewer steps, for the sanitizer
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string_view>
#include <vector>

#include "device.h"
#include "reference.h"

namespace trimkv::cuda {
namespace {

int failures = 0;

bool Expect(bool condition, const Config& config, int step, const char* what) {
  if (condition) return true;
  ++failures;
  std::fprintf(stderr, "FAILED %s, step %d: %s\n", config.name, step, what);
  return false;
}

float Tolerance(DataType type) {
  return type == DataType::kFloat32 ? 2e-5f : type == DataType::kFloat16 ? 4e-3f : 3e-2f;
}

bool Near(const std::vector<float>& actual, const std::vector<float>& expected, float tolerance) {
  for (size_t i = 0; i < actual.size(); ++i) {
    if (!(std::fabs(actual[i] - expected[i]) <= tolerance)) {
      std::fprintf(stderr, "  element %zu is %g, expected %g\n", i, actual[i], expected[i]);
      return false;
    }
  }
  return true;
}

void Run(const Config& config, int steps) {
  std::mt19937 random(std::hash<std::string_view>()(config.name));
  const float scale = 1.0f / std::sqrt(static_cast<float>(config.shape.head_dim));
  Step step = RandomStep(config, RandomTokens(config, random), random);
  State expected(config);
  DeviceModel plain(config, step, scale);
  DeviceModel recorded(config, step, scale);
  Graph graph(recorded.stream, [&] { recorded.LaunchStep(); });
  int evictions = 0;
  for (int i = 0; i < steps; ++i) {
    if (random() % 12 == 0) {  // rows fall out of phase
      const int32_t row = static_cast<int32_t>(random() % config.shape.batch);
      expected.Reset(config, row);
      plain.ResetRow(row);
      recorded.ResetRow(row);
    }
    plain.UploadStep(step);
    recorded.UploadStep(step);
    plain.LaunchStep();
    graph.Replay();
    CUDA_OK(cudaDeviceSynchronize());
    plain.DownloadResults();
    recorded.DownloadResults();

    for (int32_t layer = 0; layer < config.shape.num_layers; ++layer) {
      const auto attended = ReferenceAttention(config, expected, step, layer, scale);
      const auto actual = AsFloats(plain.attended[layer], config.type);
      if (!Expect(Near(actual, attended, Tolerance(config.type)), config, i, "attended")) return;
      if (!Expect(plain.attended[layer] == recorded.attended[layer], config, i, "attended differs in a graph")) return;
    }
    ReferenceUpdate(config, expected, step);
    const char* difference = plain.state.Difference(expected);
    if (!Expect(difference == nullptr, config, i, difference)) return;
    difference = recorded.state.Difference(expected);
    if (!Expect(difference == nullptr, config, i, "state differs in a graph")) return;
    for (int32_t row = 0; row < config.shape.batch; ++row) {
      evictions += expected.counters[static_cast<size_t>(row) * kNumCounters + kEvictions];
    }
    step = RandomStep(config, RandomTokens(config, random), random);
  }
  Expect(evictions > 0 || steps < 20, config, steps, "no eviction was tried");
  std::printf("%-45s %d steps, evictions: %s\n", config.name, steps, evictions > 0 ? "yes" : "no");
}

std::vector<Config> LargerConfigs() {
  std::vector<Config> configs;
  const auto add = [&](const char* name, CacheShape shape, int32_t group, int32_t steps, DataType type, auto change) {
    Config config;
    config.name = name;
    config.shape = shape;
    config.group = group;
    config.max_steps = steps;
    config.type = type;
    change(config);
    configs.push_back(config);
  };
  const auto same = [](Config&) {};
  const DataType f16 = DataType::kFloat16, bf16 = DataType::kBFloat16;
  add("decode D 128", {3, 2, 8, 128, 16 * 48, 8}, 4, 1, f16, same);
  add("decode D 128, bf16", {3, 2, 4, 128, 8 * 48, 8}, 4, 4, bf16, same);
  add("decode D 64, 16 query heads each", {2, 2, 2, 64, 4 * 40, 8}, 16, 1, f16, same);
  add("decode D 80", {2, 2, 2, 80, 4 * 40, 1}, 2, 8, f16, same);
  add("decode D 256", {2, 2, 2, 256, 4 * 40, 8}, 2, 2, f16, same);
  add("decode, one stream holds all", {2, 3, 4, 128, 12 * 40, 8}, 4, 2, f16,
      [](Config& c) { c.retention = Config::kOneStream; });
  add("decode, per head", {2, 3, 4, 128, 12 * 20, 8}, 4, 1, f16, [](Config& c) { c.policy = Policy::kPerHead; });
  add("decode, many rows", {200, 1, 2, 16, 2 * 12, 4}, 2, 1, f16, same);
  add("prefill D 128", {2, 2, 4, 128, 8 * 48, 8}, 4, 64, f16, same);
  add("prefill D 128, bf16", {1, 2, 4, 128, 8 * 48, 8}, 4, 70, bf16, same);
  add("prefill D 64", {2, 2, 2, 64, 4 * 40, 8}, 7, 33, f16, same);
  add("prefill D 256", {1, 2, 2, 256, 4 * 40, 8}, 4, 40, f16, same);
  add("prefill, one stream holds all", {2, 2, 4, 96, 8 * 48, 8}, 4, 50, f16,
      [](Config& c) { c.retention = Config::kOneStream; });
  add("fp32 D 128", {2, 2, 2, 128, 4 * 24, 4}, 4, 9, DataType::kFloat32, same);
  add("36 layers, 8 heads", {2, 36, 8, 32, 288 * 16, 4}, 2, 8, f16, same);
  add("36 layers, 8 heads, minimum per head", {1, 36, 8, 16, 288 * 16, 4}, 2, 20, f16, [](Config& c) {
    c.min_tokens_per_head = 2;
    c.retention = Config::kFew;
  });
  return configs;
}

}  // namespace
}  // namespace trimkv::cuda

int main(int argc, char** argv) {
  using namespace trimkv::cuda;
  const bool brief = argc > 1 && std::strcmp(argv[1], "short") == 0;
  for (const Config& config : UpdateConfigs()) Run(config, brief ? 8 : 40);
  for (const Config& config : LargerConfigs()) Run(config, brief ? 4 : 40);
  std::printf(failures == 0 ? "CUDA kernels: all right\n" : "CUDA kernels: %d FAILED\n", failures);
  return failures == 0 ? 0 : 1;
}
