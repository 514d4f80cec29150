// Both operators on a GPU against the host reference and the CPU kernels: attention within rounding, the cache state to
// the bit after every step. Every case runs twice, launch by launch and as replayed CUDA graphs of the whole step, and
// the two must agree to the bit.
//
//   test_cuda_kernels [short]    short: fewer steps and no large caches, for the sanitizer
#include <cstdio>
#include <cstring>
#include <vector>

#include "configs.h"
#include "device.h"
#include "trial.h"

namespace trimkv::test {
namespace {

std::vector<Config> LargerConfigs() {
  std::vector<Config> configs;
  const auto add = [&](const char* name, CacheShape shape, int32_t group, int32_t steps, DataType type, auto change) {
    configs.push_back(Config::Of(name, shape, group, steps, type));
    change(configs.back());
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

// Models' shapes, which only the CPU kernels can follow for hundreds of steps.
std::vector<Config> ModelConfigs() {
  const DataType f16 = DataType::kFloat16, bf16 = DataType::kBFloat16;
  std::vector<Config> configs = {
      Config::Of("Qwen3-4B, M 256", {3, 36, 8, 128, 288 * 256, 32}, 4, 32, f16),
      Config::Of("Qwen3-4B, M 64, b 128, bf16, minimum per head", {2, 36, 8, 128, 288 * 64, 128}, 4, 48, bf16),
      Config::Of("Qwen3-4B, M 128, per head", {2, 36, 8, 128, 288 * 128, 16}, 4, 32, f16),
      Config::Of("28 layers, 4 KV heads of 7, M 512", {4, 28, 4, 128, 112 * 512, 64}, 7, 24, f16),
      Config::Of("16 layers, 8 KV heads of 64, few scores", {5, 16, 8, 64, 128 * 96, 8}, 4, 40, f16),
      Config::Of("Qwen3-4B, M 32, b 8, batch 64", {64, 36, 8, 128, 288 * 32, 8}, 4, 4, f16),
  };
  configs[1].min_tokens_per_head = 8;
  configs[2].policy = Policy::kPerHead;
  configs[4].retention = Config::kFew;
  return configs;
}

}  // namespace
}  // namespace trimkv::test

int main(int argc, char** argv) {
  using namespace trimkv::test;
  const bool brief = argc > 1 && std::strcmp(argv[1], "short") == 0;
  const Trial small = {brief ? 4 : 40, brief ? 2 : 8, false, {2e-5f, 0}, {4e-3f, 0}, {3e-2f, 0}};
  Trial larger = small;
  if (brief) larger.evictions = 0;
  for (const Config& config : UpdateConfigs()) Run<DeviceModel>(config, small, {SlowJudge(config), CpuJudge(config)});
  for (const Config& config : LargerConfigs()) Run<DeviceModel>(config, larger, {SlowJudge(config), CpuJudge(config)});
  // Sums of many entries are small: what is left is the rounding of weights and results.
  Trial large = {400, 20, true, {2e-5f, 2e-5f}, {2e-3f, 1e-3f}, {1.6e-2f, 8e-3f}};
  for (const Config& config : ModelConfigs()) {
    large.steps = config.shape.batch > 8 ? 100 : 400;
    if (!brief) Run<DeviceModel>(config, large, {CpuJudge(config)});
  }
  std::printf(failures == 0 ? "CUDA kernels: all right\n" : "CUDA kernels: %d FAILED\n", failures);
  return failures == 0 ? 0 : 1;
}
